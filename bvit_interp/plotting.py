"""The style of all figures: canvas, lines, points, axes, legends, heat maps.

Lines differ in colour (Okabe & Ito's, for colour-blind readers), marker and dash, so that figures
are readable in grey. Nulls are thin: in a pale shade of their model's colour, or grey where all
models share them. Figures are made without pyplot, so there is no global state and nothing to
close, and they are drawn in a style of their own (`house_style`): the user's settings of
matplotlib change nothing. A `$` in a name is a dollar sign, never the start of a formula.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import GridSpec
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator
from matplotlib.transforms import ScaledTranslation

from bvit_interp.results import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
NULL: dict[str, Any] = {"color": "0.45", "linewidth": 1.0}
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
"""For values below and above 0, which is white."""
LONGEST_LABEL = 44  # characters
INTERVAL = "95 % interval"
"""What the bands and bars of `line` and `points` are, unless something else is said."""

_STYLE: dict[str, Any] = {"text.parse_math": False}
_IN_STYLE: ContextVar[bool] = ContextVar("in_style", default=False)
NULL_MARK, _BAND_MARK = "null", "band"  # `gid` of an artist, for its entry in the legend
_NOT_HIDDEN = "\u200b"  # matplotlib hides labels that begin with "_"
_MOST_TICKS = 13
_CHARACTER = 0.6  # mean width of a character, as a share of the size of the font


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's default settings and ours, as a context or a decorator.

    What is made, drawn or saved inside does not depend on the user's settings.
    """
    if _IN_STYLE.get():
        yield
        return
    token = _IN_STYLE.set(True)
    try:
        with matplotlib.style.context(["default", _STYLE]):
            yield
    finally:
        _IN_STYLE.reset(token)


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
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        _tidy(ax)
    return figure, axes


@house_style()
def subcanvas(panel: SubFigure, columns: int = 1, rows: int = 1, **options: Any) -> np.ndarray:
    """Axes ``(rows, columns)`` in a part of a figure, in the style of `canvas`."""
    axes = panel.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        _tidy(ax)
    return axes


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)


# ---- lines and points ----------------------------------------------------------------------------


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and dash of the i-th line."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def null_style(style: Mapping[str, Any]) -> dict[str, Any]:
    """The thin line of a null: the dash of `style` and a pale shade of its colour."""
    shade = 0.55 * np.array(to_rgb(style["color"])) + 0.45 * 0.75
    return {**NULL, "color": tuple(shade), "linestyle": style.get("linestyle", "-")}


def label_of(name: object) -> str:
    """A name as the label of an artist: matplotlib leaves labels that begin with "_" out."""
    text = str(name)
    return _NOT_HIDDEN + text if text.startswith("_") else text


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
        ax.fill_between(at, low, high, **look, label=label, gid=_BAND_MARK)


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


# ---- axes and words ------------------------------------------------------------------------------


def step_axis(ax: Axes, steps: Iterable[float]) -> None:
    """Label the x axis with whole steps, and only with steps that there are."""
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


def share_axis(ax: Axes, whole: bool = True, axis: str = "y") -> None:
    """End an axis of shares where shares end: from 0 to 1, or to what is drawn if not `whole`."""
    get, set_ = getattr(ax, f"get_{axis}lim"), getattr(ax, f"set_{axis}lim")
    set_(0, 1.02 if whole else min(get()[1], 1.02))


@house_style()
def log_axis(ax: Axes, axis: str = "y") -> None:
    """Make an axis logarithmic, with plain numbers as its labels."""
    getattr(ax, f"set_{axis}scale")("log")
    within = getattr(ax, f"{axis}axis")

    def minor(value: float, _: int) -> str:
        low, high = within.get_view_interval()
        return f"{value:g}" if 0 < low < high < 50 * low else ""

    within.set_major_locator(LogLocator())
    within.set_major_formatter("{x:g}")
    within.set_minor_locator(LogLocator(subs=(2, 5)))
    within.set_minor_formatter(minor)


@house_style()
def title(ax: Axes, text: str, fontsize: float = 10) -> None:
    """Write a title, in as many lines as keep it over its own panel."""
    most = max(12, int(_inches(ax)[0] * 72 / (_CHARACTER * fontsize)))
    ax.set_title(wrapped(text, most), fontsize=fontsize)


def wrapped(text: str, most: int) -> str:
    """A text in lines of at most `most` characters; line breaks are kept, long names broken."""
    lines = [textwrap.fill(part, most, break_on_hyphens=False) for part in text.splitlines()]
    return "\n".join(lines)


def shortened(label: object, most: int = LONGEST_LABEL) -> str:
    """The end of a label that is too long."""
    text = str(label)
    return text if len(text) <= most else f"...{text[3 - most :]}"


def _inches(ax: Axes) -> tuple[float, float]:
    """Width and height of the part of the figure that the axes and their labels have."""
    figure = ax.figure
    dpi = figure.dpi
    width, height = figure.bbox.width / dpi, figure.bbox.height / dpi
    spec = ax.get_subplotspec()
    if spec is None:
        return width, height
    rows, columns = spec.get_gridspec().get_geometry()
    return width * len(spec.colspan) / columns, height * len(spec.rowspan) / rows


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


# ---- legends -------------------------------------------------------------------------------------


@house_style()
def legend(
    ax: Axes, below: bool = False, only: Collection[str] | None = None, **options: Any
) -> None:
    """Add a legend if there are labels; only the end of a long label is shown.

    Nulls and bands are in it once, after the lines. `below` places it under the label of the x
    axis, for panels without room; `only` are the labels that it has, by default all.
    """
    entries = _entries([ax], only)
    if entries:
        look: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.8}
        if below:
            lines_of_label = 1 + max(
                (t.get_text().count("\n") for t in ax.get_xticklabels()), default=0
            )
            drop = ScaledTranslation(0, -0.36 - 0.15 * lines_of_label, ax.figure.dpi_scale_trans)
            columns = _columns(list(entries), _inches(ax)[0] - 1.0)
            _make_room(ax, math.ceil(len(entries) / columns))
            look |= {
                "loc": "upper center",
                "bbox_to_anchor": (0.5, 0),
                "bbox_transform": ax.transAxes + drop,
                "borderaxespad": 0,
                "ncols": columns,
            }
        handles, labels = _legend_arguments(entries)
        drawn = ax.legend(handles, labels, **{**_LEGEND, **look, **options})
        _write_labels(drawn, entries)


@house_style()
def legend_below(
    panel: Figure | SubFigure, axes: Iterable[Axes], without: Collection[str] = ()
) -> None:
    """One legend of all `axes` under them, each label once, `without` some."""
    entries = {key: handle for key, handle in _entries(axes).items() if key not in without}
    if not entries:
        return
    columns = _columns(list(entries), panel.bbox.width / panel.dpi)
    rows = math.ceil(len(entries) / columns)
    columns = math.ceil(len(entries) / rows)
    if isinstance(panel, Figure):
        panel.set_size_inches(panel.get_figwidth(), panel.get_figheight() + 0.18 * rows)
    handles, labels = _legend_arguments(entries)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    drawn = panel.legend(handles, labels, **{**place, **_LEGEND})
    _write_labels(drawn, entries)


_LEGEND: dict[str, Any] = {
    "fontsize": 8,
    "handlelength": 2.6,
    "handler_map": {tuple: HandlerTuple(ndivide=None, pad=0.3)},
}


def _entries(axes: Iterable[Axes], only: Collection[str] | None = None) -> dict[str, Any]:
    """Label -> handle: lines first, then nulls in all their colours, then bands in grey."""
    lines: dict[str, Any] = {}
    nulls: dict[str, Any] = {}
    bands: dict[str, Any] = {}
    for ax in axes:
        of_ax: dict[str, Any] = {}
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            mark = handle.get_gid() if isinstance(handle, Artist) else None
            kind = of_ax if mark == NULL_MARK else bands if mark == _BAND_MARK else lines
            kind.setdefault(str(label).removeprefix(_NOT_HIDDEN), handle)
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


def _make_room(ax: Axes, rows: int) -> None:
    """Make the figure higher by what a legend of more than three lines under `ax` takes."""
    figure, spec = ax.figure, ax.get_subplotspec()
    if not isinstance(figure, HouseFigure) or spec is None:
        return
    had = figure.legend_rows.setdefault(spec.rowspan.start, 3)
    if rows > had:
        figure.legend_rows[spec.rowspan.start] = rows
        figure.set_figheight(figure.get_figheight() + 0.18 * (rows - had))


def _columns(labels: Sequence[str], room: float) -> int:
    """How many columns of a legend fit beside each other in `room` inches, about."""
    widths = [(0.56 * 8 * len(shortened(label)) + 46) / 72 for label in labels]
    for columns in range(len(widths), 1, -1):
        rows = math.ceil(len(widths) / columns)
        of_columns = [widths[i : i + rows] for i in range(0, len(widths), rows)]
        if sum(map(max, of_columns)) <= room:
            return columns
    return 1


def _legend_arguments(entries: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    return list(entries.values()), [label_of(shortened(label)) for label in entries]


def _write_labels(drawn: Any, entries: Iterable[str]) -> None:
    for text, label in zip(drawn.get_texts(), entries, strict=True):
        text.set_text(shortened(label))


# ---- heat maps -----------------------------------------------------------------------------------


@house_style()
def heat_map(
    figure: Figure | SubFigure,
    ax: Axes,
    values: np.ndarray,
    columns: Sequence[Any],
    rows: Sequence[Any],
    label: str,
    numbers: bool = True,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """Draw a matrix ``(rows, columns)`` in colour, with its numbers in the cells if they fit.

    `limits` are the values of the first and the last colour; by default the smallest and the
    largest value of the matrix. Limits that begin below 0 are made symmetric around 0, which is
    white; blue is below it and red above it.
    """
    values = np.asarray(values, dtype=float)
    finite = values[np.isfinite(values)]
    if not finite.size:
        finite = np.zeros(1)
    low, high = (
        float(end(finite)) if limit is None else float(limit)
        for end, limit in zip((np.min, np.max), limits, strict=True)
    )
    palette = SEQUENTIAL
    if low < 0:
        palette, high = DIVERGING, max(-low, high)
        low = -high
    ax.grid(visible=False)
    look: dict[str, Any] = {"aspect": "auto", "origin": "upper", "interpolation": "nearest"}
    image = ax.imshow(values, cmap=palette, vmin=low, vmax=high, **look)
    names, sides = [str(name) for name in columns], [shortened(name) for name in rows]
    beside = 1.0 + max(map(len, sides), default=1) * _CHARACTER * 10 / 72  # labels, colour bar
    width, height = _inches(ax)
    width = max(72 * (width - beside), 36) / max(len(names), 1)  # of a cell, in points, about
    height = max(72 * (height - 0.8), 36) / max(len(sides), 1)
    longest = max(map(len, names), default=1)
    size = 10 if longest * _CHARACTER * 10 + 3 <= width else 8
    every = math.ceil((longest * _CHARACTER * size + 3) / width)
    ax.set_xticks(range(0, len(names), every), names[::every], fontsize=size)
    size = 10 if height > 15 else 8
    every = math.ceil(1.4 * size / height)
    ax.set_yticks(range(0, len(sides), every), sides[::every], fontsize=size)
    beyond = ("neither", "min", "max", "both")[(finite.min() < low) + 2 * (finite.max() > high)]
    figure.colorbar(image, ax=ax, label=label, shrink=0.9, extend=beyond)
    if numbers and len(columns) <= 14:
        _write_numbers(ax, values, image, (width, height))


def _write_numbers(ax: Axes, values: np.ndarray, image: Any, cell: tuple[float, float]) -> None:
    """The values in one format, in the largest font that fits; none if no font does."""
    texts = numbers_of(values)
    longest = max((len(text) for text in texts.flat), default=0)
    fitting = [
        size
        for size in (8, 7, 6)
        if longest * _CHARACTER * size <= 0.88 * cell[0] and 1.2 * size <= cell[1]
    ]
    if not fitting:
        return
    shades = np.asarray(image.cmap(image.norm(values)))
    for (i, j), text in np.ndenumerate(texts):
        if text:
            colour = "black" if _luminance(shades[i, j]) > 0.18 else "white"
            ax.text(j, i, text, ha="center", va="center", fontsize=fitting[0], color=colour)


def numbers_of(values: np.ndarray) -> np.ndarray:
    """The values of a matrix as texts in one format: as many decimals in every cell.

    No leading zero, as in papers, and no minus before a zero; nothing for NaN.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = finite.max() if finite.size else 0.0
    decimals = 3 if 0 < largest < 0.1 else 2 if largest < 10 else 1 if largest < 100 else 0

    def text(value: float) -> str:
        if not math.isfinite(value):
            return ""
        written = f"{value:.{decimals}f}"
        if not written.strip("-0."):
            written = written.removeprefix("-")
        sign = "-" if written.startswith("-") else ""
        digits = written.removeprefix("-")
        return sign + (digits.removeprefix("0") if decimals else digits)

    written = [text(float(value)) for value in values.flat]
    return np.array(written, dtype=object).reshape(values.shape)


def _luminance(colour: np.ndarray) -> float:
    """Relative luminance of sRGB, 0..1; black and white contrast with 0.18 alike."""
    linear = np.where(
        colour[:3] <= 0.04045, colour[:3] / 12.92, ((colour[:3] + 0.055) / 1.055) ** 2.4
    )
    return float(linear @ (0.2126, 0.7152, 0.0722))


# ---- images --------------------------------------------------------------------------------------


@house_style()
def overlay(
    ax: Axes,
    image: np.ndarray,
    saliency: np.ndarray | None = None,
    outline: np.ndarray | None = None,
) -> None:
    """Draw an image ``(height, width, 3)`` in 0..1, and on it a map and the outline of a mask."""
    height, width = image.shape[:2]
    look: dict[str, Any] = {"extent": (0, width, height, 0), "origin": "upper"}
    ax.grid(visible=False)
    ax.set_axis_off()
    ax.imshow(image, **look)
    if saliency is not None:
        shade = colormaps[SEQUENTIAL]((saliency - saliency.min()) / (np.ptp(saliency) or 1.0))
        ax.imshow(shade, alpha=0.7, interpolation="nearest", **look)
    if outline is not None and outline.any() and not outline.all():
        centres = (np.arange(width) + 0.5, np.arange(height) + 0.5)
        for colour, thickness in (("black", 2.4), ("white", 1.2)):  # seen on any image
            lines: dict[str, Any] = {"colors": colour, "linewidths": thickness, "levels": [0.5]}
            ax.contour(*centres, outline.astype(float), **lines)


@house_style()
def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG; an error leaves no partial file."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", facecolor="white")
