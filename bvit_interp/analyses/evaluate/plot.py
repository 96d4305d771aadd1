"""Figure of `evaluate`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Top-1 and top-5 accuracy of every model with chance, and the reliability diagram."""
    frame = frame.assign(bin=frame["bin"].astype(str))
    overall = frame[frame["bin"] == "all"]
    height = max(3.9, 2.0 + 0.35 * len(overall))
    figure, axes = plotting.canvas(columns=2, width=5.2, height=height)
    _plot_accuracy(axes[0, 0], overall)
    _plot_reliability(axes[0, 1], overall, frame[frame["bin"] != "all"])
    return figure


def _plot_accuracy(ax: Axes, overall: pd.DataFrame) -> None:
    """Accuracy with its interval and top-5 accuracy, one row per model; the nulls as lines."""
    rows = range(len(overall))
    first, second = plotting.line_style(0), plotting.line_style(1)
    below, above = overall["accuracy"] - overall["low"], overall["high"] - overall["accuracy"]
    error = [below.clip(lower=0), above.clip(lower=0)]  # at 0 and 1 rounding may cross the value
    ax.plot(overall["accuracy"], rows, first["marker"], color=first["color"], label="top-1")
    ax.errorbar(overall["accuracy"], rows, xerr=error, fmt="none", color=first["color"], capsize=3)
    ax.plot(overall["top5_accuracy"], rows, second["marker"], color=second["color"], label="top-5")
    for i, chance in enumerate(sorted(set(overall["chance"]))):
        ax.axvline(chance, **plotting.NULL, label=None if i else "chance, top-1")
    for i, chance in enumerate(sorted(set(overall["top5_chance"].dropna()))):
        ax.axvline(chance, **plotting.NULL, linestyle="--", label=None if i else "chance, top-5")
    ax.set_yticks(rows, [plotting.shortened(name) for name in overall["model"]])
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set(xlim=(0, 1.02), xlabel="share of images")
    plotting.title(ax, "accuracy (bars: 95 % interval)")
    ax.set_ylim(len(overall) - 0.5, -0.5)
    plotting.legend(ax, below=True)


def _plot_reliability(ax: Axes, overall: pd.DataFrame, bins: pd.DataFrame) -> None:
    """Accuracy against confidence of every bin."""
    errors = overall.set_index("model")["calibration_error"]
    for i, name in enumerate(overall["model"]):
        part = bins[bins["model"] == name]
        style = plotting.line_style(i)
        thin = style | {"linewidth": 1.0, "marker": None}
        label = f"{name}: error {errors[name]:.3f}"
        plotting.line(ax, part, "confidence", "accuracy", style=thin, label=label, interval=None)
        area = 200 * (part["n"] / part["n"].sum()) ** 0.5
        mark = {"color": style["color"], "marker": style["marker"], "alpha": 0.7}
        ax.scatter(part["confidence"], part["accuracy"], area, **mark)
    ax.plot([0, 1], [0, 1], **plotting.NULL, label="calibrated")
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1.02),
        xlabel="mean confidence of the bin",
        ylabel="accuracy of the bin",
    )
    plotting.title(ax, "reliability (marker area: root of the number of images)")
    plotting.legend(ax, below=True)
