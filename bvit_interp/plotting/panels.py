"""Figures, their panels and axes, and how they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FixedLocator, LogLocator

from bvit_interp.plotting.style import CHARACTER, house_style, wrapped
from bvit_interp.results import replacing

_MOST_TICKS = 13


class HouseFigure(Figure):
    """A figure that is drawn and saved in `house_style`, also when the user does it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.legend_rows: dict[int, int] = {}  # row of panels -> lines of the legends below it

    @house_style()
    def draw(self, renderer: RendererBase) -> None:
        super().draw(renderer)

    @house_style()
    def savefig(self, fname: Any, **options: Any) -> None:  # type: ignore[override]
        super().savefig(fname, **options)


@house_style()
def blank(width: float, height: float) -> Figure:
    """A figure without axes; `width` and `height` in inches."""
    return HouseFigure(figsize=(width, height), layout="constrained")


@house_style()
def canvas(
    columns: int = 1, rows: int = 1, width: float = 4.2, height: float = 3.2
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes ``(rows, columns)``; `width` and `height` of one panel in inches."""
    figure = blank(width * columns, height * rows)
    return figure, subcanvas(figure, columns, rows)


@house_style()
def subcanvas(
    panel: Figure | SubFigure, columns: int = 1, rows: int = 1, **options: Any
) -> np.ndarray:
    """Axes ``(rows, columns)`` in a figure or a part of it, in the style of `canvas`.

    `options` are those of matplotlib's `Figure.subplots`.
    """
    axes = panel.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return axes


def leave_out_empty(figure: Figure, axes: np.ndarray) -> None:
    """Remove the axes of a `canvas` in which nothing is drawn, and close the gaps."""
    filled = [ax for ax in axes.flat if ax.has_data()]
    for ax in axes.flat:
        if not ax.has_data():
            ax.remove()
    if not filled or len(filled) == axes.size:
        return
    rows, columns = axes.shape
    kept_columns = min(columns, len(filled))
    kept_rows = math.ceil(len(filled) / kept_columns)
    grid = GridSpec(kept_rows, kept_columns, figure)
    for i, ax in enumerate(filled):
        ax.set_subplotspec(grid[i // kept_columns, i % kept_columns])
    width, height = figure.get_size_inches()
    figure.set_size_inches(width * kept_columns / columns, height * kept_rows / rows)


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the part of the figure that the axes and their labels have."""
    figure = ax.figure
    dpi = figure.dpi
    width, height = figure.bbox.width / dpi, figure.bbox.height / dpi
    spec = ax.get_subplotspec()
    if spec is None:
        return width, height
    rows, columns = spec.get_gridspec().get_geometry()
    return width * len(spec.colspan) / columns, height * len(spec.rowspan) / rows


@house_style()
def title(ax: Axes, text: str, fontsize: float = 10) -> None:
    """Write a title, in as many lines as keep it over its own panel."""
    most = max(12, int(inches(ax)[0] * 72 / (CHARACTER * fontsize)))
    ax.set_title(wrapped(text, most), fontsize=fontsize)


def step_axis(ax: Axes, steps: Iterable[float]) -> None:
    """Label the x axis with whole steps, and only with steps that exist."""
    listed = sorted({int(step) for step in steps if not pd.isna(step)})
    ax.xaxis.set_major_locator(FixedLocator(_some_of(listed)))
    ax.set_xlabel("step")


def _some_of(steps: list[int]) -> list[int]:
    """At most `_MOST_TICKS` of the steps: the first one and multiples of a number."""
    for every in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 50, 100, 200, 500, 1000):
        first = steps[0] if steps else 0
        kept = [s for s in steps if s == first or (s % every == 0 and 2 * (s - first) > every)]
        if len(kept) <= _MOST_TICKS:
            return kept
    return steps[:: math.ceil(len(steps) / _MOST_TICKS)]


def share_axis(ax: Axes) -> None:
    """Let the y axis of shares run from 0 to 1, with room for markers at 1."""
    ax.set_ylim(0, 1.02)


@house_style()
def log_axis(ax: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as its labels."""
    ax.set_yscale("log")

    def minor(value: float, _: float) -> str:
        low, high = ax.yaxis.get_view_interval()
        return f"{value:g}" if 0 < low < high < 50 * low else ""

    ax.yaxis.set_major_locator(LogLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter(minor)


@house_style()
def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG; an error leaves no partial file."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", facecolor="white")
