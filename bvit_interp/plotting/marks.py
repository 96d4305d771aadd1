"""Lines and points with their intervals and nulls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bvit_interp.plotting.style import (
    BAND_MARK,
    NULL,
    NULL_MARK,
    house_style,
    label_of,
    null_style,
)

INTERVAL = "95 % interval"
"""What the bands of `line` are, unless something else is said."""


@house_style()
def line(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str = "value",
    *,
    style: Mapping[str, Any],
    label: str | None = None,
    interval: tuple[str, str] | None = ("low", "high"),
    interval_label: str | None = INTERVAL,
    null: str | None = None,
    null_label: str | None = None,
    null_interval: tuple[str, str] | None = None,
) -> None:
    """Draw column `y` over column `x` as a line, its interval as a band and its null as a thin
    line.

    Parameters
    ----------
    frame : the rows of the line, in any order.
    style : colour, marker and dash, from `line_style`.
    interval : the columns of the lower and upper end of the band; None draws no band.
    interval_label : what the band is, for the legend.
    null : the column of the null, drawn in `null_style`, or in grey if a line before it in `ax`
        has the same null; None draws no null.
    null_interval : the columns of the lower and upper end of the band of the null.
    """
    rows = frame.sort_values(x, kind="stable")
    at = rows[x].astype(float)
    ax.plot(at, rows[y].astype(float), **style, label=None if label is None else label_of(label))
    if interval is not None:
        _band(ax, at, rows, interval, style["color"], interval_label)
    if null is not None:
        pale = null_style(style)
        if len(rows) == 1:  # a line of one point is not seen
            pale |= {"marker": "_", "markersize": 9}
        values = rows[null].astype(float)
        (drawn,) = ax.plot(at, values, **pale, label=null_label, gid=NULL_MARK)
        _share_null(ax, drawn)
        if null_interval is not None:
            _band(ax, at, rows, null_interval, pale["color"], interval_label)


def _band(
    ax: Axes,
    at: pd.Series,
    rows: pd.DataFrame,
    ends: tuple[str, str],
    colour: Any,
    label: str | None,
) -> None:
    low, high = (rows[end].astype(float) for end in ends)
    if (low.notna() & high.notna()).any():
        look = {"color": colour, "alpha": 0.15, "linewidth": 0}
        ax.fill_between(at, low, high, **look, label=label, gid=BAND_MARK)


def _share_null(ax: Axes, drawn: Line2D) -> None:
    """Make a null grey if an earlier one of other colour has the same values."""
    values = np.asarray(drawn.get_xydata())
    for other in ax.lines:
        if other.get_gid() != NULL_MARK or other.get_color() == drawn.get_color():
            continue
        same = np.asarray(other.get_xydata())
        if same.shape == values.shape and np.allclose(same, values, equal_nan=True):
            for each in (other, drawn):
                each.set(color=NULL["color"], linestyle="-")


@house_style()
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
    """Draw column `y` as points with error bars, and each null as a tick in `null_style`.

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
    shown = None if label is None else label_of(label)
    ax.errorbar(positions, value, errors, **unjoined, label=shown)
    if null is not None:
        nulls = frame[null].to_numpy(dtype=float)
        tick = {"color": null_style(style)["color"], "markersize": 9, "markeredgewidth": 1.5}
        ax.plot(positions, nulls, "_", **tick, label=null_label, gid=NULL_MARK)
