"""How accurate is the head after every step, also past the trained ones?

Fig. 8, Appendix B of bViT (arXiv 2605.10661): the model's own final norm and head applied to the tokens after step t,
``y_t = W_c RMSNorm(z_t^cls) + b_c`` (eq. 5 at every t), for t = 1..24 of a model trained for T = 12, in one pass over
the images. Past T a bViT goes on applying its block (a time embedding stays at its last row: our choice, the paper
leaves it undefined); a stacked ViT, timm's or the matched `vit_rms_*`, has only its own blocks. The null is `chance`,
the share of the most frequent class among the images. FLOPs are counted as in the paper, and with the products of
attention beside.

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
    from bvit_interp.probes.probe import Probe
    from bvit_interp.probes.scores import Classification
    from bvit_interp.vocabulary import Address


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
    "agreement": "share of images with the answer of step T, 0..1; none if fewer steps are run",
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
    from bvit_interp.probes.probe import Probe

    classes = {name: label_map(data, model) for name, model in models.items()}
    probes = {name: Probe(_run_on(model, config.steps)) for name, model in models.items()}
    trained = {name: len(model.blocks) for name, model in models.items()}
    scores = {name: _metrics(probe) for name, probe in probes.items()}
    agreement = {name: _metrics(probe) for name, probe in probes.items() if trained[name] <= probe.num_steps}
    loader, geometries = config.loader(data, models, "step-accuracy")
    for batch in loader:
        for name, probe in probes.items():
            parts = run_in_halves(
                lambda part, name=name, probe=probe: (
                    _logits(probe, part.views[geometries[name]][0]), classes[name][part.labels]
                ),
                batch,
            )  # fmt: skip
            for logits, labels in parts:
                _update(scores[name], logits, labels)
                if name in agreement:  # the answer after step T in place of the label
                    _update(agreement[name], logits, logits[trained[name] - 1].argmax(-1))
    rows = []
    for name, of_steps in scores.items():
        for t, metric in enumerate(of_steps, start=1):
            agrees = agreement[name][t - 1].compute()["top1"] if name in agreement else math.nan
            rows.append(_row(name, models[name], t, metric.compute(), agrees))
    return pd.DataFrame(rows)[list(COLUMNS)]


def _run_on(model: VisionTransformer, steps: int) -> VisionTransformer:
    """The unroll of `steps` steps; of a stack, or of an unroll, at most as many as it has.

    A `BViT` with as many blocks as steps, and more than one, is a stack: its first block does not come again.
    """
    from bvit_interp.models.steps import Steps
    from bvit_interp.models.unroll import unroll

    stored, own = len(list(model.blocks.children())), len(model.blocks)
    recurrent = isinstance(model.blocks, Steps) and not 1 < stored == own
    return unroll(model, steps if recurrent else min(steps, own))


def _metrics(probe: Probe) -> list[Classification]:
    """One a step, on the model's device from the start: a process without images takes part in the gather too."""
    from bvit_interp.probes.scores import Classification

    device = next(probe.model.parameters()).device
    return [Classification(probe.model.num_classes).to(device) for _ in range(probe.num_steps)]


def _logits(probe: Probe, images: Tensor) -> Tensor:
    """The head's logits after every step, ``(T, B, C)``; no activation outlives its step."""
    import torch

    model, answers = probe.model, dict[int, "Tensor"]()

    def answer(tokens: Tensor, address: Address) -> None:
        answers[address.step] = model.forward_head(model.norm(tokens))

    steps = range(1, probe.num_steps + 1)
    with torch.inference_mode(), probe.edit({("resid_post", t): answer for t in steps}):
        probe(images.to(next(model.parameters()).device))
    return torch.stack([answers[t] for t in steps])


def _update(scores: list[Classification], logits: Tensor, labels: Tensor) -> None:
    """Score the logits of every step ``(T, B, C)``."""
    for metric, of_step in zip(scores, logits, strict=True):
        metric.update(of_step, labels.to(logits.device))


def _row(name: str, model: VisionTransformer, step: int, found: Mapping[str, Any], agreement: float) -> dict[str, Any]:
    from bvit_interp.metrics import wilson_interval

    low, high = wilson_interval(found["top1"] * found["n"], found["n"])
    return {
        "model": name, "step": step, "trained_steps": len(model.blocks), "low": low, "high": high,
        "agreement": agreement, "gflops": _gflops(model, step, False), "gflops_attention": _gflops(model, step, True),
        **{key: value for key, value in found.items() if key in COLUMNS},
    }  # fmt: skip


def _gflops(model: VisionTransformer, steps: int, count_attention: bool) -> float:
    from bvit_interp.models.cost import flops

    try:
        return flops(model, count_attention=count_attention, steps=steps) / 1e9
    except UserError:  # parts whose cost is not known
        return math.nan


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 8: accuracy against step, and beside it agreement with the answer of step T."""
    from bvit_interp import plotting

    figure, axes = plotting.canvas(columns=2, width=5.2, height=3.6)
    left, right = axes[0]
    for i, (name, part) in enumerate(frame.groupby("model", sort=False)):
        style = plotting.line_style(i)
        left.plot(part["step"], part["top1"], **style, label=name)
        left.fill_between(part["step"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)
        right.plot(part["step"], part["agreement"], **style, label=name)
    for i, chance in enumerate(sorted(set(frame["chance"]))):
        left.axhline(chance, **plotting.NULL, label=None if i else "chance: most frequent class")
    for ax, title in ((left, "top-1 of the head after the step"), (right, "same answer as after step T")):
        for trained in sorted(set(frame["trained_steps"])):
            ax.axvline(trained, **plotting.NULL, linestyle="--", label=f"trained for T = {trained}")
        ax.set_title(title, fontsize=10)
        ax.set_ylim(0, 1.02)
        plotting.step_axis(ax, frame["step"])
    plotting.legend(left)
    left.set_ylabel("share of images")
    return figure
