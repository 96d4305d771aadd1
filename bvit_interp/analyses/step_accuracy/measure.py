"""Accuracy of the model's own head after every step.

Fig. 8, Appendix B of bViT (arXiv 2605.10661): the model's own final norm and head applied to the
tokens after step t, ``y_t = W_c RMSNorm(z_t^cls) + b_c`` (eq. 5 at every t), for t = 1..24 of a
model trained for T = 12, in one pass over the images. Beyond T a bViT continues to apply its block
(a time embedding stays at its last row: our choice, the paper leaves it undefined); a stacked ViT,
from timm or a matched `vit_rms_*`, has only its own blocks. Beside the accuracy stand measures of
the logit lens: the entropy, the rank of the true class, and how often the prediction changes from
one step to the next. Nulls: `chance`, the share of the most frequent class among the images;
`true_rank_null`, the mean rank of the true class for logits in random order; `flips_null`, the
flips of independent predictions with the same class frequencies. FLOPs are counted as in the paper,
and also with the products of attention.

Cost: `steps` / T forwards per image; 1000 images of 32 px and three models of width 128 take 45 s
on one core. Expected: in the paper the accuracy is low over the first steps, highest at step 12
(0.779 for bViT-B on ImageNet-1K) and falls steadily beyond it: the model does not reach a fixed
point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.step_accuracy import COLUMNS, Config
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.predictions import StepPredictions
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.models.cost import flops
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import answer, device_of, states
from bvit_interp.models.unroll import for_any_model, run_on


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Scores of every model after every step.

    Parameters
    ----------
    models : name -> model; all models see each image in one pass.
    data : labelled images of the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    unrolled = {name: run_on(model, config.steps) for name, model in models.items()}
    metrics = {
        name: _StepMetrics(view, len(models[name].blocks)) for name, view in unrolled.items()
    }

    def classify(batch: ModelBatch) -> tuple[Tensor, Tensor]:
        view = unrolled[batch.model]
        after = itertools.islice(states(view, batch.images), 1, None)
        return torch.stack([answer(view, state) for state in after]), batch.labels

    for name, (logits, labels) in stream(
        models, data, config, classify, progress="step-accuracy", labels=True
    ):
        metrics[name].update(logits, labels)
    rows = [
        _row(name, models[name], step, scores)
        for name, of_model in metrics.items()
        for step, scores in enumerate(of_model.compute(), start=1)
    ]
    return pd.DataFrame(rows)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The whole table."""
    return frame


class _StepMetrics:
    """Scores of each step, and predictions along the steps.

    They are on the model's device from the start: a process without images takes part in the gather
    too.
    """

    def __init__(self, view: Model, trained: int) -> None:
        device, steps, classes = device_of(view), len(view.blocks), view.num_classes
        reference = trained if trained <= steps else None
        self.predictions = StepPredictions(steps, classes, reference).to(device)
        self.scores = [Classification(classes).to(device) for _ in range(steps)]

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits ``(T, B, C)``, labels ``(B,)``."""
        for metric, of_step in zip(self.scores, logits, strict=True):
            metric.update(of_step, labels)
        self.predictions.update(logits, labels)

    def compute(self) -> list[dict[str, Any]]:
        """The scores of each step."""
        along = self.predictions.compute()
        return [
            metric.compute() | {key: float(values[i]) for key, values in along.items()}
            for i, metric in enumerate(self.scores)
        ]


def _row(name: str, model: Model, step: int, scores: Mapping[str, Any]) -> dict[str, Any]:
    low, high = wilson_interval(scores["accuracy"] * scores["n"], scores["n"])
    return {
        "model": name,
        "step": step,
        "trained_steps": len(model.blocks),
        "low": low,
        "high": high,
        "true_rank_null": (model.num_classes + 1) / 2,
        "gflops": _gflops(model, step, False),
        "gflops_attention": _gflops(model, step, True),
        **{key: value for key, value in scores.items() if key in COLUMNS},
    }


def _gflops(model: Model, steps: int, count_attention: bool) -> float:
    try:
        return flops(model, count_attention=count_attention, steps=steps) / 1e9
    except UserError:  # parts whose cost is not known
        return math.nan
