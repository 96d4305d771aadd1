"""How accurate is the head after every step, also past the trained ones?

Fig. 8, Appendix B of bViT (arXiv 2605.10661): the model's own final norm and head applied to the
tokens after step t, ``y_t = W_c RMSNorm(z_t^cls) + b_c`` (eq. 5 at every t), for t = 1..24 of a
model trained for T = 12, in one pass over the images. Past T a bViT goes on applying its block (a
time embedding stays at its last row: our choice, the paper leaves it undefined); a stacked ViT,
timm's or the matched `vit_rms_*`, has only its own blocks. Beside accuracy, what the logit lens
shows: entropy, the rank of the true class, and how often the answer changes from one step to the
next. Nulls: `chance`, the share of the most frequent class among the images; `rank_null`, the true
class's mean rank under logits in random order; `flips_null`, the flips of independent answers given
as often. FLOPs are counted as in the paper, and with the products of attention beside.

Cost: `steps` / T forwards an image; 1000 images of 32 px and three models of width 128 take 45 s on
one core. Expected: in the paper accuracy is low over the first steps, highest at step 12 (0.779 for
bViT-B on ImageNet-1K) and drops steadily past it: the model does not come to a fixed point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.step_accuracy import COLUMNS, Config
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.predictions import StepPredictions
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.models.cost import flops
from bvit_interp.models.stepping import advance, answer, embed
from bvit_interp.models.unroll import run_on


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Scores of every model after every step.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    classes = {name: label_map(data, model) for name, model in models.items()}
    unrolled = {name: run_on(model, config.steps) for name, model in models.items()}
    scores = {name: _metrics(view, len(models[name].blocks)) for name, view in unrolled.items()}
    loader, geometries = config.loader(data, models, "step-accuracy")
    for batch in loader:
        for name, view in unrolled.items():
            parts = run_in_halves(
                lambda part, name=name, view=view: (
                    _logits(view, part.views[geometries[name]][0]),
                    classes[name][part.labels],
                ),
                batch,
            )
            for logits, labels in parts:
                _update(*scores[name], logits, labels.to(logits.device))
    rows = []
    for name, (of_steps, answers) in scores.items():
        changes = answers.compute()
        for t, metric in enumerate(of_steps, start=1):
            along = {key: float(values[t - 1]) for key, values in changes.items()}
            rows.append(_row(name, models[name], t, metric.compute() | along))
    return pd.DataFrame(rows)[list(COLUMNS)]


def _metrics(view: VisionTransformer, trained: int) -> tuple[list[Classification], StepPredictions]:
    """Scores of each step and along them, on the model's device from the start: a process without
    images takes part in the gather too."""
    device, steps, classes = next(view.parameters()).device, len(view.blocks), view.num_classes
    answers = StepPredictions(steps, classes, trained if trained <= steps else None)
    return [Classification(classes).to(device) for _ in range(steps)], answers.to(device)


def _logits(view: VisionTransformer, images: Tensor) -> Tensor:
    """The head's logits after every step, ``(T, B, C)``; no state outlives its step."""
    with torch.inference_mode():
        state, logits = embed(view, images.to(next(view.parameters()).device)), []
        for _ in view.blocks:
            state = advance(view, state)
            logits.append(answer(view, state))
    return torch.stack(logits)


def _update(scores: list[Classification], answers: StepPredictions, logits: Tensor, labels: Tensor) -> None:
    """Score the logits of every step ``(T, B, C)``."""
    for metric, of_step in zip(scores, logits, strict=True):
        metric.update(of_step, labels)
    answers.update(logits, labels)


def _row(
    name: str, model: VisionTransformer, step: int, found: Mapping[str, Any]
) -> dict[str, Any]:
    low, high = wilson_interval(found["top1"] * found["n"], found["n"])
    return {
        "model": name,
        "step": step,
        "trained_steps": len(model.blocks),
        "low": low,
        "high": high,
        "rank_null": (model.num_classes + 1) / 2,
        "gflops": _gflops(model, step, False),
        "gflops_attention": _gflops(model, step, True),
        **{key: value for key, value in found.items() if key in COLUMNS},
    }


def _gflops(model: VisionTransformer, steps: int, count_attention: bool) -> float:
    try:
        return flops(model, count_attention=count_attention, steps=steps) / 1e9
    except UserError:  # parts whose cost is not known
        return math.nan


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All of it."""
    return frame
