"""Figure of `lens`, from its table alone; example maps from their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from bvit_interp import plotting

# (metric, tokens): title, unit, null
_PANELS = {
    ("accuracy", "cls"): ("accuracy", "share of images", "most frequent class"),
    ("kl", "cls"): (
        "KL from the final prediction",
        "nats",
        "final prediction of another image",
    ),
    ("calibration_error", "cls"): ("calibration error", "15 bins", "sampling alone"),
    ("exit_accuracy", "cls"): (
        "early exit, thresholds from 0 to 1",
        "accuracy",
        "leaving at random",
    ),
    ("accuracy", "patches"): ("accuracy", "mean share of patches", "most frequent class"),
    ("pointing", "patches"): (
        "maximum of the map on the object",
        "share of images",
        "mask of another image",
    ),
    ("map_correlation", "patches"): (
        "correlation with the map of step T",
        "Pearson's r",
        "map of another image",
    ),
}
_STANDS_FOR = {"cls": ("answer",)}  # of a model whose head does not read CLS alone
_NAMES = {"cls": "CLS"}
_SHOWN_STEPS = 7  # of an example


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy, divergence, calibration and early exit on CLS, accuracy and maps of patches; below,
    example maps."""
    masks = (frame["metric"] == "pointing").any()
    left_out = "map_correlation" if masks else "pointing"
    examples = _examples(frame)
    heights = [6.4, *(0.5 + 2.1 * len(arrays["images"]) for arrays in examples.values())]
    figure = plotting.blank(12.5, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = {}
    for (metric, tokens), (title, unit, null) in _PANELS.items():
        of_tokens = frame["tokens"].isin((tokens, *_STANDS_FOR.get(tokens, ())))
        rows = frame[(frame["metric"] == metric) & of_tokens]
        if metric != left_out and len(rows):
            kinds = " and ".join(_NAMES.get(kind, kind) for kind in rows["tokens"].unique())
            panels[f"{kinds}: {title}"] = rows, unit, null
    axes = plotting.subcanvas(parts[0], columns=3, rows=-(-len(panels) // 3))
    for ax, (title, (rows, unit, null)) in zip(axes.flat, panels.items(), strict=False):
        _panel(ax, rows, title, unit, null)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    plotting.legend_below(parts[0], [axes[0, 0]])
    for part, (name, arrays) in zip(parts[1:], examples.items(), strict=True):
        _example_maps(part, name, arrays)
    return figure


def _examples(frame: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Model -> the arrays of its examples, where there are any."""
    examples = {}
    for _, row in frame.dropna(subset="path").drop_duplicates("model").iterrows():
        path = Path(row["path"])
        if path.exists():
            with np.load(path) as arrays:
                examples[str(row["model"])] = dict(arrays)
    return {name: arrays for name, arrays in examples.items() if len(arrays["images"])}


def _panel(ax: Axes, frame: pd.DataFrame, title: str, unit: str, null: str) -> None:
    """One metric of each model, raw dashed and hollow, tuned solid; thin: its null, and in grey the
    shuffled lens."""
    exits = frame["threshold"].notna().any()
    x = "mean_step" if exits else "step"
    for i, name in enumerate(dict.fromkeys(frame["model"])):
        for lens, part in frame[frame["model"] == name].groupby("lens", sort=False):
            style = plotting.line_style(i) | {"linestyle": "-", "markersize": 3 if exits else 4}
            if lens == "shuffled":
                grey = {"linestyle": ":", "marker": style["marker"], "markersize": 2}
                label = None if i else "tuned on logits of other images"
                plotting.line(ax, part, x, style=plotting.NULL | grey, label=label, interval=None)
                continue
            if lens == "raw":
                style |= {"linestyle": "--", "markerfacecolor": "white"}
            label = f"{name}, {lens}"
            is_first = i == 0 and lens != "raw"
            named = "null: see the title of the panel" if is_first else None
            plotting.line(ax, part, x, style=style, label=label, null="null", null_label=named)
    if not exits:
        plotting.step_axis(ax, frame["step"])
    ax.set(xlabel="mean step at which images leave" if exits else "step", ylabel=unit)
    if frame["value"].min() >= 0:
        ax.set_ylim(bottom=0)
    plotting.title(ax, f"{title}\nnull: {null}")


def _example_maps(panel: SubFigure, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Example images, and every patch's probability of the true class after some steps: raw, and
    tuned below."""
    steps = np.unique(np.linspace(1, arrays["maps"].shape[2], _SHOWN_STEPS).round().astype(int))
    count, lenses = len(arrays["images"]), list(arrays["lenses"])
    axes = panel.subplots(count * len(lenses), len(steps) + 1, squeeze=False)
    for i in range(count):
        for j, lens in enumerate(lenses):
            row = axes[i * len(lenses) + j]
            row[0].imshow(arrays["images"][i])
            row[0].set_ylabel(f"{arrays['classes'][i]}\n{lens}", fontsize=9)
            for ax, step in zip(row[1:], steps, strict=True):
                probability = np.exp(arrays["maps"][i, j, step - 1])
                shown = ax.imshow(probability, cmap=plotting.SEQUENTIAL, vmin=0, vmax=1)
                if not i and not j:
                    ax.set_title(f"step {step}", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    panel.colorbar(shown, ax=axes, label="probability of the true class", shrink=0.8, pad=0.01)
    panel.suptitle(f"{name}: the true class in every patch", fontsize=10)
