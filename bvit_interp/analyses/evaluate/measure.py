"""How often is the model right, and how well does it know?

Tables 1-3, section 4.1 of bViT (arXiv 2605.10661) print top-1 accuracy; beside it stand top-5, the cross-entropy and
the expected calibration error ``sum_m (n_m / n) |accuracy_m - confidence_m|`` over bins of equal width of the largest
softmax probability (Guo et al., ICML 2017; 15 bins as there). Whether the paper scores raw or averaged (EMA) weights
it does not say: the command line scores both where a checkpoint has both. The nulls are `chance` and `chance5`, the
shares of the most frequent class and of the five most frequent among the images. Each model has a row `bin` = all and
one for every bin that holds images: the reliability diagram.

Cost: one forward an image; 1000 images of 32 px and three models of width 128 take 20 s on one core.
Expected: in the paper 0.779 top-1 for bViT-B and 0.789 for ViT-B on ImageNet-1K; it prints no calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the evaluation."""

    bins: int = 15
    """Bins of equal width of the confidence, for the calibration error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 1:
            raise UserError(f"bins must be >= 1, got {self.bins}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Without the bins of calibration."""
        return frame[frame["bin"] == "all"]


COLUMNS = {
    "model": "checkpoint; NAME@ema are its averaged weights",
    "bin": "all images, or bin of the confidence from 1 (the least confident); bins without images have no row",
    "n": "images",
    "top1": "share of images classified right, 0..1",
    "low": "lower end of Wilson's 95 % interval of it",
    "high": "upper end of it",
    "top5": "share whose class is among the five of the largest logits, 0..1; none for fewer than 5 classes",
    "loss": "mean cross-entropy, nats",
    "confidence": "mean of the largest softmax probability, 0..1",
    "calibration_error": "expected calibration error, 0..1",
    "chance": "null of top1: share of the most frequent class among the images, 0..1",
    "chance5": "null of top5: share of the five most frequent classes, 0..1",
}


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Scores of every model.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes.

    Returns
    -------
    A table of `COLUMNS`: first the row `bin` = all of every model, then their bins.
    """
    import pandas as pd

    from bvit_interp.data.labels import label_map
    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.scores import Classification

    classes = {name: label_map(data, model) for name, model in models.items()}
    # on the model's device from the start: a process without images takes part in the gather too
    scores = {
        name: Classification(model.num_classes, config.bins).to(next(model.parameters()).device)
        for name, model in models.items()
    }
    loader, geometries = config.loader(data, models, "evaluate")
    for batch in loader:
        for name, model in models.items():
            parts = run_in_halves(
                lambda part, name=name, model=model: (
                    _logits(model, part.views[geometries[name]][0]), classes[name][part.labels]
                ),
                batch,
            )  # fmt: skip
            for logits, labels in parts:
                scores[name].update(logits, labels.to(logits.device))
    found = {name: metric.compute() for name, metric in scores.items()}
    rows = [_row(name, of_model) for name, of_model in found.items()]
    rows += [row for name, of_model in found.items() for row in _bin_rows(name, of_model)]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def _logits(model: VisionTransformer, images: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        return model(images.to(next(model.parameters()).device))


def _row(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The row over all images."""
    from bvit_interp.metrics import wilson_interval

    low, high = wilson_interval(found["top1"] * found["n"], found["n"])
    return {"model": name, "bin": "all", "low": low, "high": high} | {
        key: value for key, value in found.items() if key in COLUMNS
    }


def _bin_rows(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    from bvit_interp.metrics import wilson_interval

    rows = []
    bins = zip(found["bin_n"], found["bin_confidence"], found["bin_accuracy"], strict=True)
    for m, (n, confidence, accuracy) in enumerate(bins, start=1):
        if n:
            low, high = wilson_interval(accuracy * n, n)
            rows.append(
                {"model": name, "bin": str(m), "n": n, "top1": accuracy, "low": low, "high": high,
                 "confidence": confidence}
            )  # fmt: skip
    return rows


def plot(frame: pd.DataFrame) -> Figure:
    """Top-1 and top-5 of every model with chance, and the reliability diagram."""
    from bvit_interp import plotting

    frame = frame.assign(bin=frame["bin"].astype(str))
    overall = frame[frame["bin"] == "all"]
    names = list(overall["model"])
    figure, axes = plotting.canvas(columns=2, width=5.2, height=max(3.6, 1.6 + 0.35 * len(names)))
    _plot_accuracy(axes[0, 0], overall)
    ax = axes[0, 1]
    for i, name in enumerate(names):
        part = frame[(frame["model"] == name) & (frame["bin"] != "all")]
        error = overall.loc[overall["model"] == name, "calibration_error"].iloc[0]
        style = plotting.line_style(i)
        thin = style | {"linewidth": 1.0, "marker": None}
        ax.plot(part["confidence"], part["top1"], **thin, label=f"{name}: error {error:.3f}")
        area = 200 * (part["n"] / part["n"].sum()) ** 0.5
        mark = {"color": style["color"], "marker": style["marker"], "alpha": 0.7}
        ax.scatter(part["confidence"], part["top1"], area, **mark)
    ax.plot([0, 1], [0, 1], **plotting.NULL, label="calibrated")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="mean confidence of the bin", ylabel="accuracy of the bin")
    ax.set_title("reliability (area: root of the images in the bin)", fontsize=10)
    plotting.legend(ax)
    return figure


def _plot_accuracy(ax: Axes, overall: pd.DataFrame) -> None:
    """Dots, a row for each model: the interval of top-1, and the nulls as lines."""
    from bvit_interp import plotting

    rows = range(len(overall))
    first, second = plotting.line_style(0), plotting.line_style(1)
    reach = [overall["top1"] - overall["low"], overall["high"] - overall["top1"]]
    ax.plot(overall["top1"], rows, first["marker"], color=first["color"], label="top-1")
    ax.errorbar(overall["top1"], rows, xerr=reach, fmt="none", color=first["color"], capsize=3)
    ax.plot(overall["top5"], rows, second["marker"], color=second["color"], label="top-5")
    for i, chance in enumerate(sorted(set(overall["chance"]))):
        ax.axvline(chance, **plotting.NULL, label=None if i else "chance, top-1")
    for i, chance in enumerate(sorted(set(overall["chance5"].dropna()))):
        ax.axvline(chance, **plotting.NULL, linestyle="--", label=None if i else "chance, top-5")
    ax.set_yticks(rows, overall["model"])
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set(xlim=(0, 1.02), xlabel="share of images")
    ax.set_title("accuracy", fontsize=10)
    plotting.legend(ax)
    ax.get_legend().set_frame_on(True)  # it may lie on a null
