"""Figure of `features`, from its table alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from bvit_interp import plotting

Part = tuple[str, pd.DataFrame]
"""A model's name and its rows."""


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Images of each neuron and step over the best real images (Fig. 3); centroids per step."""
    by_model = frame.sort_values("step", kind="stable").groupby("model", sort=False)
    models = [(str(name), part) for name, part in by_model]
    columns = max(part["step"].nunique() for _, part in models)
    heights = [0.35 + 2 * 0.98 * part["neuron"].nunique() for _, part in models] + [3.5]
    width = max(0.86 * columns + 1.1, 4.2 * len(models))
    figure = plotting.blank(width, sum(heights))
    panels = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (name, part) in zip(panels[:-1], models, strict=True):
        _plot_pictures(panel, name, part, columns)
    _plot_centroids(panels[-1], models)
    return figure


def _plot_pictures(panel: SubFigure, name: str, part: pd.DataFrame, columns: int) -> None:
    """Optimised image over best real image, with the activation under each."""
    steps, neurons = sorted(part["step"].unique()), list(dict.fromkeys(part["neuron"]))
    axes = panel.subplots(2 * len(neurons), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax in axes[:, len(steps) :].flat:  # another model has more steps
        ax.set_axis_off()
    rows = {(row.neuron, row.step): row for row in part.itertuples()}
    for i, neuron in enumerate(neurons):
        change = part.loc[part["neuron"] == neuron, "correlation_distance"].iloc[0]
        axes[2 * i, 0].set_ylabel(f"neuron {neuron}\nchange {change:.2f}", fontsize=7)
        axes[2 * i + 1, 0].set_ylabel("best real", fontsize=7, color="0.4")
        for j, step in enumerate(steps):
            _plot_pair(axes[2 * i, j], axes[2 * i + 1, j], rows.get((neuron, step)))
    for ax, step in zip(axes[0, : len(steps)], steps, strict=True):
        ax.set_title(f"step {step}", fontsize=8)
    panel.suptitle(name, fontsize=10)


def _plot_pair(above: Axes, below: Axes, row: Any) -> None:
    """The images of one row of the table; a grey field if their file is missing."""
    if row is None:
        above.set_axis_off()
        below.set_axis_off()
        return
    reached = f"{row.activation:.2f}"
    label, colour = (reached, "black") if row.exceeds_real else (f"({reached})", "0.6")
    above.set_xlabel(label, fontsize=7, labelpad=2, color=colour)
    below.set_xlabel(f"{row.real_activation:.2f}", fontsize=7, labelpad=2, color="0.4")
    if not isinstance(row.path, str) or not Path(row.path).is_file():
        for ax in (above, below):
            _plot_missing(ax)
        return
    top_images = row.top_images.split()
    pictures = np.split(imread(row.path), 1 + len(top_images), axis=1)
    above.imshow(pictures[0])
    below.imshow(pictures[1])
    (height, width), (rows, columns) = pictures[1].shape[:2], map(int, row.patch_grid.split("x"))
    r, c = map(int, top_images[0].partition(":")[2].split(","))
    corner = (c * width / columns - 0.5, r * height / rows - 0.5)
    size = (width / columns, height / rows)
    below.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1))


def _plot_missing(ax: Axes) -> None:
    ax.set_facecolor("0.93")
    place: dict[str, Any] = {"transform": ax.transAxes, "ha": "center", "va": "center"}
    ax.text(0.5, 0.5, "no file", **place, fontsize=7, color="0.4")


def _plot_centroids(panel: SubFigure, models: list[Part]) -> None:
    """Centroid per step of every neuron, their mean, and the nulls."""
    axes = plotting.subcanvas(panel, columns=len(models), sharey=True)[0]
    for ax, (name, part) in zip(axes, models, strict=True):
        first = part.iloc[0]
        exceeding = part["spectral_centroid"].where(part["exceeds_real"] > 0)
        counted = part.assign(spectral_centroid=exceeding)
        for i, (neuron, of_neuron) in enumerate(counted.groupby("neuron", sort=False)):
            style = plotting.line_style(i) | {"linewidth": 0.9, "markersize": 3}
            label = f"neuron {neuron}"
            plotting.line(
                ax,
                of_neuron,
                "step",
                "spectral_centroid",
                style=style,
                label=label,
                interval=None,
            )
        plotting.line(
            ax,
            counted.groupby("step", as_index=False).mean(numeric_only=True),
            "step",
            "spectral_centroid",
            style={"color": "black", "linewidth": 2},
            label="mean (band: steps shuffled)",
            interval=("centroid_null_low", "centroid_null_high"),
            interval_label=None,
        )
        start = first["start_spectral_centroid"]
        ax.axhline(start, **plotting.NULL, linestyle=":", label="start image")
        ax.set_title(
            f"{name}\ntrend {first['spearman_mean']:+.2f}, steps shuffled"
            f" {first['spearman_null_low']:+.2f} to {first['spearman_null_high']:+.2f}",
            fontsize=9,
        )
        ax.set_ylim(bottom=0)
        ax.set_xlim(part["step"].min() - 0.5, part["step"].max() + 0.5)  # also without any line
        plotting.step_axis(ax, part["step"])
        plotting.legend(ax, below=True)  # each model has neurons of its own
    axes[0].set_ylabel("spectral centroid, cycles/pixel")
