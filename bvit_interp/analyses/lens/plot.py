"""Figure of `lens`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from bvit_interp import plotting

_PANELS = {
    ("top1", "cls"): ("CLS: accuracy", "share of images", "most frequent class"),
    ("kl", "cls"): ("CLS: KL from the final answer", "nats", "final answer of another image"),
    ("calibration_error", "cls"): ("CLS: calibration error", "15 bins", "sampling alone"),
    ("exit_accuracy", "cls"): (
        "CLS: leaving early, tau from 0 to 1",
        "share of images right",
        "leaving at random",
    ),
    ("top1", "patches"): ("patches: accuracy", "mean share of patches", "most frequent class"),
    ("pointing", "patches"): (
        "maps: maximum on the object",
        "share of images",
        "mask of another image",
    ),
    ("map_correlation", "patches"): (
        "maps: correlation with that of T",
        "Pearson's",
        "map of another image",
    ),
}


def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy, divergence, calibration and early exit on CLS, accuracy and maps of patches; below,
    example maps."""
    masks = (frame["statistic"] == "pointing").any()
    panels = [key for key in _PANELS if key[0] != ("map_correlation" if masks else "pointing")]
    paths = frame.dropna(subset="path").drop_duplicates("model")
    examples = {
        name: _read(Path(path)) for name, path in zip(paths["model"], paths["path"], strict=True)
    }
    examples = {
        name: arrays for name, arrays in examples.items() if arrays and len(arrays["images"])
    }
    heights = [6.4, *(0.5 + 2.1 * len(arrays["images"]) for arrays in examples.values())]
    figure = Figure(figsize=(12.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(2, 3)
    for ax, key in zip(axes.flat, panels, strict=True):
        _panel(
            ax, frame[(frame["statistic"] == key[0]) & (frame["tokens"] == key[1])], *_PANELS[key]
        )
    lines = [line for line in axes[0, 0].lines if not str(line.get_label()).startswith("_")]
    lines.sort(key=lambda line: line.get_linestyle() == ":")  # the null last
    parts[0].legend(
        handles=lines,
        loc="outside upper center",
        ncols=min(len(lines), 5),
        frameon=False,
        fontsize=9,
    )
    for part, (name, arrays) in zip(parts[1:], examples.items(), strict=True):
        _strip(part, str(name), arrays)
    return figure


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path) as found:
        return dict(found)


def _panel(ax: Axes, frame: pd.DataFrame, title: str, unit: str, null: str) -> None:
    """A statistic of each model, raw dashed and hollow, tuned solid; grey: its null, and the
    shuffled lens."""
    exits = frame["threshold"].notna().any()
    x = "mean_step" if exits else "step"
    for i, name in enumerate(dict.fromkeys(frame["model"])):
        for lens, part in frame[frame["model"] == name].groupby("lens", sort=False):
            style = plotting.line_style(i) | {"linestyle": "-", "markersize": 3 if exits else 4}
            if lens == "shuffled":
                label = None if i else "tuned on answers of other images"
                ax.plot(
                    part[x],
                    part["value"],
                    **plotting.NULL,
                    linestyle=":",
                    marker=style["marker"],
                    markersize=2,
                    label=label,
                )
                continue
            if lens == "raw":
                style |= {"linestyle": "--", "markerfacecolor": "white"}
            part = part.sort_values(x)
            ax.plot(part[x], part["value"], **style, label=f"{name}, {lens}")
            ax.fill_between(
                part[x], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0
            )
            ax.plot(
                part[x], part["null"], **plotting.NULL, linestyle=style["linestyle"], label="_null"
            )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    if not exits:
        plotting.step_axis(ax, frame["step"])
    ax.set(xlabel="mean step at which images leave" if exits else "step", ylabel=unit)
    ax.set_ylim(bottom=None if exits or frame["value"].min() < 0 else 0)
    ax.set_title(f"{title}\ngrey: {null}", fontsize=10)


def _strip(panel: SubFigure, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Example images, and what every patch gives the true class after some steps: raw, and tuned
    below."""
    steps = np.unique(np.linspace(1, arrays["maps"].shape[2], 7).round().astype(int))
    count, lenses = len(arrays["images"]), list(arrays["lenses"])
    axes = panel.subplots(count * len(lenses), len(steps) + 1, squeeze=False)
    for i, (image, label, of_image) in enumerate(
        zip(arrays["images"], arrays["classes"], arrays["maps"], strict=True)
    ):
        for j, (lens, maps) in enumerate(zip(lenses, of_image, strict=True)):
            row = axes[i * len(lenses) + j]
            row[0].imshow(image)
            row[0].set_ylabel(f"{label}\n{lens}", fontsize=9)
            for ax, step in zip(row[1:], steps, strict=True):
                shown = ax.imshow(np.exp(maps[step - 1]), cmap=plotting.SEQUENTIAL, vmin=0, vmax=1)
                if not i and not j:
                    ax.set_title(f"step {step}", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    panel.colorbar(shown, ax=axes, label="probability of the true class", shrink=0.8, pad=0.01)
    panel.suptitle(f"{name}: the true class in every patch", fontsize=10)
