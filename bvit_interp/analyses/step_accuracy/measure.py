"""How accurate is the head after every step, also past the trained ones?

Fig. 8, Appendix B of bViT (arXiv 2605.10661): the model's own final norm and head applied to the tokens after step t,
``y_t = W_c RMSNorm(z_t^cls) + b_c`` (eq. 5 at every t), for t = 1..24 of a model trained for T = 12, in one pass over
the images. Past T a bViT goes on applying its block (a time embedding stays at its last row: our choice, the paper
leaves it undefined); a stacked ViT, timm's or the matched `vit_rms_*`, has only its own blocks. Beside accuracy, what
the logit lens shows: entropy, the rank of the true class, and how often the answer changes from one step to the next.
Nulls: `chance`, the share of the most frequent class among the images; `rank_null`, the true class's mean rank under
logits in random order; `flips_null`, the flips of independent answers given as often. FLOPs are counted as in the
paper, and with the products of attention beside.

Cost: `steps` / T forwards an image; 1000 images of 32 px and three models of width 128 take 45 s on one core.
Expected: in the paper accuracy is low over the first steps, highest at step 12 (0.779 for bViT-B on ImageNet-1K)
and drops steadily past it: the model does not come to a fixed point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.answers import Answers
    from bvit_interp.probes.scores import Classification


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the step accuracy."""

    steps: int = 24
    """Steps to run, from 1; a stacked ViT (one of timm, or a matched `vit_rms_*`) stops at its last block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")


COLUMNS = {
    "model": "checkpoint",
    "step": "step t after which the head answers, from 1",
    "trained_steps": "steps T the model was made for; of a stack, its blocks",
    "n": "images",
    "top1": "share of images classified right, 0..1",
    "low": "lower end of Wilson's 95 % interval of it",
    "high": "upper end of it",
    "top5": "share whose class is among the five of the largest logits, 0..1; none for fewer than 5 classes",
    "loss": "mean cross-entropy, nats",
    "confidence": "mean of the largest softmax probability, 0..1",
    "entropy": "mean entropy of the softmax, nats",
    "true_rank": "mean rank of the true class among the logits, 1 (largest) to C",
    "rank_null": "null: the rank expected of logits in random order, (C + 1) / 2",
    "agreement": "share of images with the answer of step T, 0..1; none if fewer steps are run",
    "flips": "share of images whose answer differs from the step before's, 0..1; none at step 1",
    "flips_null": "null: the same if both steps' answers were independent and as frequent, 0..1; none at step 1",
    "gflops": "10^9 FLOPs of an image up to this step and the head, without QK^T and AV as in the paper;"
    " none where not known",
    "gflops_attention": "the same with QK^T and AV",
    "chance": "null: share of the most frequent class among the images, 0..1",
}


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
    import pandas as pd

    from bvit_interp.data.labels import label_map
    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.models.unroll import run_on

    classes = {name: label_map(data, model) for name, model in models.items()}
    unrolled = {name: run_on(model, config.steps) for name, model in models.items()}
    scores = {name: _metrics(view, len(models[name].blocks)) for name, view in unrolled.items()}
    loader, geometries = config.loader(data, models, "step-accuracy")
    for batch in loader:
        for name, view in unrolled.items():
            parts = run_in_halves(
                lambda part, name=name, view=view: (
                    _logits(view, part.views[geometries[name]][0]), classes[name][part.labels]
                ),
                batch,
            )  # fmt: skip
            for logits, labels in parts:
                _update(*scores[name], logits, labels.to(logits.device))
    rows = []
    for name, (of_steps, answers) in scores.items():
        changes = answers.compute()
        for t, metric in enumerate(of_steps, start=1):
            along = {key: float(values[t - 1]) for key, values in changes.items()}
            rows.append(_row(name, models[name], t, metric.compute() | along))
    return pd.DataFrame(rows)[list(COLUMNS)]


def _metrics(view: VisionTransformer, trained: int) -> tuple[list[Classification], Answers]:
    """Scores of each step and along them, on the model's device from the start: a process without images takes part
    in the gather too."""
    from bvit_interp.probes.answers import Answers
    from bvit_interp.probes.scores import Classification

    device, steps, classes = next(view.parameters()).device, len(view.blocks), view.num_classes
    answers = Answers(steps, classes, trained if trained <= steps else None)
    return [Classification(classes).to(device) for _ in range(steps)], answers.to(device)


def _logits(view: VisionTransformer, images: Tensor) -> Tensor:
    """The head's logits after every step, ``(T, B, C)``; no state outlives its step."""
    import torch

    from bvit_interp.models.stepping import advance, answer, embed

    with torch.inference_mode():
        state, logits = embed(view, images.to(next(view.parameters()).device)), []
        for _ in view.blocks:
            state = advance(view, state)
            logits.append(answer(view, state))
    return torch.stack(logits)


def _update(scores: list[Classification], answers: Answers, logits: Tensor, labels: Tensor) -> None:
    """Score the logits of every step ``(T, B, C)``."""
    for metric, of_step in zip(scores, logits, strict=True):
        metric.update(of_step, labels)
    answers.update(logits, labels)


def _row(name: str, model: VisionTransformer, step: int, found: Mapping[str, Any]) -> dict[str, Any]:
    from bvit_interp.metrics import wilson_interval

    low, high = wilson_interval(found["top1"] * found["n"], found["n"])
    return {
        "model": name, "step": step, "trained_steps": len(model.blocks), "low": low, "high": high,
        "rank_null": (model.num_classes + 1) / 2,
        "gflops": _gflops(model, step, False), "gflops_attention": _gflops(model, step, True),
        **{key: value for key, value in found.items() if key in COLUMNS},
    }  # fmt: skip


def _gflops(model: VisionTransformer, steps: int, count_attention: bool) -> float:
    from bvit_interp.models.cost import flops

    try:
        return flops(model, count_attention=count_attention, steps=steps) / 1e9
    except UserError:  # parts whose cost is not known
        return math.nan


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 8: accuracy against step; then agreement with step T, flips between steps, and the true class's rank."""
    from bvit_interp import plotting

    figure, axes = plotting.canvas(columns=2, rows=2, width=5.0, height=3.2)
    panels = {
        "top1": ("top-1 of the head after the step", "chance", "chance: most frequent class"),
        "agreement": ("same answer as after step T", None, ""),
        "true_rank": ("mean rank of the true class", "rank_null", "logits in random order"),
        "flips": ("answer differs from the step before's", "flips_null", "independent answers"),
    }
    for ax, (column, (title, null, label)) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, part) in enumerate(frame.groupby("model", sort=False)):
            style = plotting.line_style(i)
            ax.plot(part["step"], part[column], **style, label=name if column == "top1" else None)
            if column == "top1":
                ax.fill_between(part["step"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)
            if null:
                ax.plot(part["step"], part[null], **plotting.NULL, label=None if i else label)
        for trained in sorted(set(frame["trained_steps"])):
            ax.axvline(
                trained,
                **plotting.NULL,
                linestyle="--",
                label=f"trained for T = {trained}" if column == "top1" else None,
            )
        ax.set_title(title, fontsize=10)
        ax.set_ylim(*((1, None) if column == "true_rank" else (0, 1.02)))
        ax.set_xlim(0, frame["step"].max() + 1)
        plotting.step_axis(ax, frame["step"])
        plotting.legend(ax)
    for ax, label in zip(axes[:, 0], ("share of images", "rank, 1 = first"), strict=True):
        ax.set_ylabel(label)
    return figure
