"""The style of all figures: canvas, lines, points, axes, heat maps.

Lines differ in colour (Okabe & Ito's, for colour-blind readers), marker and dash, so that figures
are readable in grey. Nulls are thin grey lines. Figures are made without pyplot, so there is no
global state and nothing to close.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, MaxNLocator

from bvit_interp.results import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
NULL: dict[str, Any] = {"color": "0.45", "linewidth": 1.0}
SEQUENTIAL = "viridis"
LONGEST_LABEL = 44  # characters


def canvas(
    columns: int = 1, rows: int = 1, width: float = 4.2, height: float = 3.2
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes ``(rows, columns)``; `width` and `height` of one panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        _house_style(ax)
    return figure, axes


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and dash of the i-th line."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def line(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str = "value",
    *,
    style: Mapping[str, Any],
    label: str | None = None,
    interval: tuple[str, str] | None = ("low", "high"),
    null: str | None = None,
    null_label: str | None = None,
) -> None:
    """Draw column `y` over column `x` as a line, its interval as a band and its null in grey.

    Parameters
    ----------
    frame : the rows of the line, in any order.
    style : colour, marker and dash, from `line_style`.
    interval : the columns of the lower and upper end of the band; None draws no band.
    null : the column of the null, drawn with the dash of the line; None draws no null.
    """
    rows = frame.sort_values(x, kind="stable")
    at = rows[x].astype(float)
    ax.plot(at, rows[y].astype(float), **style, label=label)
    if interval is not None:
        low, high = (rows[end].astype(float) for end in interval)
        ax.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
    if null is not None:
        grey: dict[str, Any] = {**NULL, "linestyle": style.get("linestyle", "-")}
        ax.plot(at, rows[null].astype(float), **grey, label=null_label)


def points(
    ax: Axes,
    at: Iterable[float],
    frame: pd.DataFrame,
    y: str = "value",
    *,
    style: Mapping[str, Any],
    label: str | None = None,
    interval: tuple[str, str] | None = ("low", "high"),
    null: str | None = None,
    null_label: str | None = None,
) -> None:
    """Draw column `y` as points with error bars, and each null as a grey tick.

    Parameters
    ----------
    at : positions on the x axis, one per row of `frame`.
    """
    positions = list(at)
    value = frame[y].to_numpy(dtype=float)
    errors = None
    if interval is not None:
        low, high = (frame[end].to_numpy(dtype=float) for end in interval)
        errors = np.clip([value - low, high - value], 0, None)
    unjoined = dict(style) | {"linestyle": "", "linewidth": 1.0}
    ax.errorbar(positions, value, errors, **unjoined, label=label)
    if null is not None:
        colour = NULL["color"]
        nulls = frame[null].to_numpy(dtype=float)
        ax.plot(positions, nulls, "_", markersize=9, color=colour, label=null_label)


def subcanvas(panel: SubFigure, columns: int = 1, rows: int = 1, **options: Any) -> np.ndarray:
    """Axes ``(rows, columns)`` in a part of a figure, in the style of `canvas`."""
    axes = panel.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        _house_style(ax)
    return axes


def _house_style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)


def step_axis(ax: Axes, steps: Iterable[float]) -> None:
    """Label the x axis with whole steps."""
    listed = sorted({int(step) for step in steps})
    if len(listed) <= 13:
        ax.xaxis.set_major_locator(FixedLocator(listed))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")


def legend(ax: Axes) -> None:
    """Add a legend without a frame if there are labels; only the end of a long label is shown."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        short = [
            label if len(label) <= LONGEST_LABEL else f"...{label[3 - LONGEST_LABEL :]}"
            for label in labels
        ]
        ax.legend(handles, short, frameon=False, fontsize=8)


def heat_map(
    figure: Figure | SubFigure,
    ax: Axes,
    values: np.ndarray,
    columns: list[Any],
    rows: list[Any],
    label: str,
    numbers: bool = True,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """Draw a matrix ``(rows, columns)`` in colour, with its numbers in the cells if they fit.

    `limits` are the values of the first and the last colour; by default the smallest and the
    largest value of the matrix.
    """
    ax.grid(visible=False)
    image = ax.imshow(values, aspect="auto", cmap=SEQUENTIAL, vmin=limits[0], vmax=limits[1])
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=ax, label=label, shrink=0.9)
    if numbers and len(columns) <= 14:
        shade = np.asarray(image.norm(values))
        for (i, j), value in np.ndenumerate(values):
            ink = "black" if shade[i, j] > 0.6 else "white"
            ax.text(
                j,
                i,
                f"{value:.2f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=6,
                color=ink,
            )


def overlay(
    ax: Axes,
    image: np.ndarray,
    saliency: np.ndarray | None = None,
    outline: np.ndarray | None = None,
) -> None:
    """Draw an image ``(height, width, 3)`` in 0..1, and on it a map and the outline of a mask."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    ax.grid(visible=False)
    ax.set_axis_off()
    ax.imshow(image, extent=extent)
    if saliency is not None:
        shade = colormaps[SEQUENTIAL]((saliency - saliency.min()) / (np.ptp(saliency) or 1.0))
        ax.imshow(shade, extent=extent, alpha=0.7, interpolation="nearest")
    if outline is not None and outline.any() and not outline.all():
        centres = (np.arange(width) + 0.5, np.arange(height) + 0.5)
        ax.contour(*centres, outline.astype(float), levels=[0.5], colors="white", linewidths=1.2)


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG; an error leaves no partial file."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", facecolor="white")
