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


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 3: a row of pictures a neuron, a column a step, best real images beneath; then the
    centroids per step."""
    models = list(frame.sort_values("step", kind="stable").groupby("model", sort=False))
    columns = max(part["step"].nunique() for _, part in models)
    heights = [0.35 + 2 * 0.98 * part["neuron"].nunique() for _, part in models]
    figure = Figure(
        figsize=(max(0.86 * columns + 1.1, 4.2 * len(models)), sum(heights) + 3.0),
        layout="constrained",
    )
    panels = figure.subfigures(len(models) + 1, 1, height_ratios=[*heights, 3.0], squeeze=False)[
        :, 0
    ]
    for panel, (name, part) in zip(panels, models, strict=False):
        _plot_pictures(panel, name, part, columns)
    _plot_centroids(panels[-1], models)
    return figure


def _plot_pictures(panel: SubFigure, name: str, part: pd.DataFrame, columns: int) -> None:
    """Optimised image over best real image, activation under each; models of fewer steps leave
    columns empty."""
    steps, neurons = sorted(part["step"].unique()), list(dict.fromkeys(part["neuron"]))
    axes = panel.subplots(2 * len(neurons), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax in axes[:, len(steps) :].flat:
        ax.set_axis_off()
    rows = {(row.neuron, row.step): row for row in part.itertuples()}
    for i, neuron in enumerate(neurons):
        change = part.loc[part["neuron"] == neuron, "change"].iloc[0]
        axes[2 * i, 0].set_ylabel(f"neuron {neuron}\nchange {change:.2f}", fontsize=7)
        axes[2 * i + 1, 0].set_ylabel("best real", fontsize=7, color="0.4")
        for j, step in enumerate(steps):
            _plot_pair(axes[2 * i, j], axes[2 * i + 1, j], rows.get((neuron, step)))
    for ax, step in zip(axes[0], steps, strict=False):
        ax.set_title(f"step {step}", fontsize=8)
    panel.suptitle(name, fontsize=10)


def _plot_pair(above: Axes, below: Axes, row: Any) -> None:
    """The pictures of one row of the table; a grey field where their file is missing."""
    if row is None:
        above.set_axis_off()
        below.set_axis_off()
        return
    reached = f"{row.activation:.2f}" if row.found else f"({row.activation:.2f})"
    above.set_xlabel(reached, fontsize=7, labelpad=2, color="black" if row.found else "0.6")
    below.set_xlabel(f"{row.real:.2f}", fontsize=7, labelpad=2, color="0.4")
    if not isinstance(row.path, str) or not Path(row.path).is_file():
        for ax in (above, below):
            ax.set_facecolor("0.93")
            ax.text(
                0.5,
                0.5,
                "no file",
                transform=ax.transAxes,
                ha="center",
                va="center",
                fontsize=6,
                color="0.4",
            )
        return
    best = row.top.split()
    pictures = np.split(imread(row.path), 1 + len(best), axis=1)
    above.imshow(pictures[0])
    below.imshow(pictures[1])
    (height, width), (rows, columns) = pictures[1].shape[:2], map(int, row.grid.split("x"))
    r, c = map(int, best[0].partition(":")[2].split(","))
    corner = (c * width / columns - 0.5, r * height / rows - 0.5)
    below.add_patch(
        Rectangle(
            corner, width / columns, height / rows, fill=False, edgecolor="white", linewidth=1
        )
    )


def _plot_centroids(panel: SubFigure, models: list[tuple[Any, pd.DataFrame]]) -> None:
    """Centroid per step of every neuron, their mean, and the nulls."""
    axes = panel.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for ax, (name, part) in zip(axes, models, strict=True):
        first, counted = (
            part.iloc[0],
            part.assign(centroid=part["centroid"].where(part["found"] > 0)),
        )
        for i, (neuron, of_neuron) in enumerate(counted.groupby("neuron", sort=False)):
            style = plotting.line_style(i) | {"linewidth": 0.9, "markersize": 3}
            ax.plot(of_neuron["step"], of_neuron["centroid"], **style, label=f"neuron {neuron}")
        means = counted.groupby("step")[["centroid", "band_low", "band_high"]].mean()
        ax.plot(means.index, means["centroid"], color="black", linewidth=2, label="mean")
        ax.fill_between(
            means.index,
            means["band_low"],
            means["band_high"],
            color="0.85",
            label="mean, steps shuffled",
        )
        ax.axhline(first["centroid_start"], **plotting.NULL, linestyle=":", label="start image")
        ax.set_title(
            f"{name}: trend {first['trend']:+.2f}, shuffled {first['trend_low']:+.2f} to {first['trend_high']:+.2f}",
            fontsize=9,
        )
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(bottom=0)
        ax.set_xlim(part["step"].min() - 0.5, part["step"].max() + 0.5)  # also where nothing counts
        plotting.step_axis(ax, part["step"])
        plotting.legend(ax)  # each model has neurons of its own
    axes[0].set_ylabel("spectral centroid, cycles/pixel")
