"""Figure of `trajectories`, from its table alone."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.trajectories import METHODS

_MOST_CLASSES = 10
_MOST_MODELS = 3


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 9: one panel per class, with the step as the colour and the mean path of the class.

    At most the ten most frequent classes and the first three models are drawn, with PaCMAP's points
    if the table has them.
    """
    method = next(each for each in METHODS if (frame["method"] == each).any())
    frame = frame[frame["method"] == method]
    models = list(dict.fromkeys(frame["model"]))[:_MOST_MODELS]
    frequent = frame.groupby("label", sort=False).size().sort_values(ascending=False, kind="stable")
    classes = sorted(frequent.index[:_MOST_CLASSES], key=str)
    columns = min(len(classes), 5)
    rows = -(-len(classes) // columns)
    figure, axes = plotting.canvas(columns, rows * len(models), width=2.3, height=2.3)
    last = int(frame["step"].max())
    # up to 0.92: the palette's end is too light on white
    shades = LinearSegmentedColormap.from_list(
        "steps", colormaps[plotting.SEQUENTIAL]([i / 99 * 0.92 for i in range(100)])
    )
    norm = BoundaryNorm([t + 0.5 for t in range(last + 1)], shades.N)
    for m, name in enumerate(models):
        points = frame[frame["model"] == name]
        for ax, label in zip(axes[m * rows : (m + 1) * rows].flat, classes, strict=False):
            _panel(ax, points, points[points["label"] == label], shades, norm)
            plotting.title(ax, str(label), 9)
        for ax in list(axes[m * rows : (m + 1) * rows].flat)[len(classes) :]:
            ax.set_axis_off()
        if len(models) > 1:
            axes[m * rows, 0].set_ylabel(plotting.wrapped(str(name), 20 * rows), fontsize=9)
    bar = figure.colorbar(
        ScalarMappable(norm, shades), ax=axes, label="step", aspect=30, shrink=0.8
    )
    bar.set_ticks([t for t in range(1, last + 1) if last <= 12 or t % 6 == 0 or t == 1])
    bar.ax.minorticks_off()
    title = {"pacmap": "PaCMAP", "pca": "PCA"}[method]
    lines = [
        f"{title}. Share of the nearest neighbours in 2-D (in CLS space, null):",
        *(_caption(frame, name) for name in models),
    ]
    figure.suptitle("\n".join(plotting.wrapped(line, 38 * columns) for line in lines), fontsize=8)
    return figure


def _panel(
    ax: Axes, everything: pd.DataFrame, of_class: pd.DataFrame, shades: Any, norm: Any
) -> None:
    """The points and the mean path of one class, over all points in grey."""
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])
    ax.scatter(everything["x"], everything["y"], s=3, color="0.9", linewidths=0)
    ax.scatter(
        of_class["x"], of_class["y"], s=7, c=of_class["step"], cmap=shades, norm=norm, linewidths=0
    )
    path = of_class.groupby("step")[["x", "y"]].mean()
    ax.plot(path["x"], path["y"], color="white", linewidth=3.5)
    ax.plot(path["x"], path["y"], color="black", linewidth=1.3, marker="o", markersize=2)
    for step in (path.index.min(), path.index.max()):
        ax.annotate(
            str(step),
            path.loc[step, ["x", "y"]],
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            weight="bold",
            bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.8},
        )
    ax.set_aspect("equal", adjustable="datalim")


def _caption(frame: pd.DataFrame, name: str) -> str:
    """The checks of one model in one line."""
    mean = frame[frame["model"] == name].mean(numeric_only=True)
    # a table of an earlier version has the share among the points of all steps
    same_step = "same_step_class_share" in mean
    of_class = "same_step_class_share" if same_step else "same_class_share"
    shares = [
        f"{words} {mean[share]:.2f} ({mean[f'{share}_cls']:.2f}, {mean[f'{share}_null']:.2f})"
        for words, share in (
            ("at most one step away", "adjacent_step_share"),
            (f"of the same class {'at the step' if same_step else 'at any step'}", of_class),
        )
    ]
    kept, chance = mean["neighbours_kept"], mean["neighbours_kept_null"]
    return f"{name}: {'; '.join(shares)}; kept from CLS space {kept:.2f} (chance {chance:.3f})"
