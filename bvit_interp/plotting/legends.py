"""Legends, within a panel, below it, or for several panels."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from bvit_interp.plotting.panels import HouseFigure, inches
from bvit_interp.plotting.style import (
    BAND_MARK,
    NOT_HIDDEN,
    NULL_MARK,
    house_style,
    label_of,
    shortened,
)

_FONT_SIZE = 8
_LINE = 0.18  # height of a line of a legend, inches
_USUAL_LINES = 3  # of a legend below a panel, for which every panel has room


@house_style()
def legend(ax: Axes, below: bool = False, only: Collection[str] | None = None) -> None:
    """Add a legend if there are labels; of a long label, only the end is shown.

    Nulls and bands are in it once, after the lines.

    Parameters
    ----------
    below : place it under the label of the x axis, for panels without room.
    only : the labels to show; by default all.
    """
    entries = _entries([ax], only)
    if entries:
        look: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.8}
        if below:
            look |= _place_below(ax, list(entries))
        _draw(ax, entries, look)


@house_style()
def legend_below(
    panel: Figure | SubFigure, axes: Iterable[Axes], without: Collection[str] = ()
) -> None:
    """Add one legend of all `axes` under them, with each label once, except those in `without`."""
    entries = {key: handle for key, handle in _entries(axes).items() if key not in without}
    if not entries:
        return
    columns = _columns(list(entries), panel.bbox.width / panel.dpi)
    rows = math.ceil(len(entries) / columns)
    columns = math.ceil(len(entries) / rows)
    if isinstance(panel, Figure):
        panel.set_size_inches(panel.get_figwidth(), panel.get_figheight() + _LINE * rows)
    _draw(panel, entries, {"loc": "outside lower center", "ncols": columns, "frameon": False})


def _draw(
    owner: Axes | Figure | SubFigure, entries: Mapping[str, Any], look: Mapping[str, Any]
) -> None:
    labels = [shortened(label) for label in entries]
    drawn = owner.legend(
        list(entries.values()),
        [label_of(label) for label in labels],
        fontsize=_FONT_SIZE,
        handlelength=2.6,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.3)},
        **look,
    )
    for text, label in zip(drawn.get_texts(), labels, strict=True):
        text.set_text(label)


def _entries(axes: Iterable[Axes], only: Collection[str] | None = None) -> dict[str, Any]:
    """Label -> handle: lines first, then nulls in all their colours, then bands in grey."""
    lines: dict[str, Any] = {}
    nulls: dict[str, Any] = {}
    bands: dict[str, Any] = {}
    for ax in axes:
        of_ax: dict[str, Any] = {}
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            mark = handle.get_gid() if isinstance(handle, Artist) else None
            kind = of_ax if mark == NULL_MARK else bands if mark == BAND_MARK else lines
            kind.setdefault(str(label).removeprefix(NOT_HIDDEN), handle)
        if len(of_ax) == 1:  # it stands for the nulls of all models
            of_ax = dict.fromkeys(of_ax, _in_all_colours(ax))
        nulls = {**of_ax, **nulls}
    bands = dict.fromkeys(bands, Patch(facecolor="0.45", alpha=0.25, linewidth=0))
    entries = {**lines, **nulls, **bands}
    return entries if only is None else {key: entries[key] for key in entries if key in only}


def _in_all_colours(ax: Axes) -> tuple[Line2D, ...]:
    """The nulls in `ax`, one per colour, at most four."""
    drawn = [each for each in ax.lines if each.get_gid() == NULL_MARK]
    return tuple({to_rgb(each.get_color()): each for each in drawn}.values())[:4]


def _place_below(ax: Axes, labels: Sequence[str]) -> dict[str, Any]:
    """Options of a legend under the label of the x axis; makes room for it in the figure."""
    lines_of_ticks = 1 + max((t.get_text().count("\n") for t in ax.get_xticklabels()), default=0)
    drop = ScaledTranslation(0, -0.36 - 0.15 * lines_of_ticks, ax.figure.dpi_scale_trans)
    columns = _columns(labels, inches(ax)[0] - 1.0)
    _make_room(ax, math.ceil(len(labels) / columns))
    return {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, 0),
        "bbox_transform": ax.transAxes + drop,
        "borderaxespad": 0,
        "ncols": columns,
    }


def _make_room(ax: Axes, lines: int) -> None:
    """Make the figure higher by what a legend of more than the usual lines under `ax` takes."""
    figure, spec = ax.figure, ax.get_subplotspec()
    if not isinstance(figure, HouseFigure) or spec is None:
        return
    had = figure.legend_rows.setdefault(spec.rowspan.start, _USUAL_LINES)
    if lines > had:
        figure.legend_rows[spec.rowspan.start] = lines
        figure.set_figheight(figure.get_figheight() + _LINE * (lines - had))


def _columns(labels: Sequence[str], room: float) -> int:
    """How many columns of a legend fit side by side in `room` inches, about."""
    widths = [(0.56 * _FONT_SIZE * len(shortened(label)) + 46) / 72 for label in labels]
    for columns in range(len(widths), 1, -1):
        rows = math.ceil(len(widths) / columns)
        of_columns = [widths[i : i + rows] for i in range(0, len(widths), rows)]
        if sum(map(max, of_columns)) <= room:
            return columns
    return 1
