"""Figure of `evaluate`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting


def plot(frame: pd.DataFrame) -> Figure:
    """Top-1 and top-5 of every model with chance, and the reliability diagram."""
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
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1.02),
        xlabel="mean confidence of the bin",
        ylabel="accuracy of the bin",
    )
    ax.set_title("reliability (area: root of the images in the bin)", fontsize=10)
    plotting.legend(ax)
    return figure


def _plot_accuracy(ax: Axes, overall: pd.DataFrame) -> None:
    """Dots, a row for each model: the interval of top-1, and the nulls as lines."""
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
