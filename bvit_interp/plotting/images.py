"""Heat maps, and pictures with a map or a mask over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from bvit_interp.plotting.panels import inches
from bvit_interp.plotting.style import CHARACTER, DIVERGING, SEQUENTIAL, house_style, shortened

_MOST_NUMBERS = 14  # columns of a heat map with numbers


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

    Parameters
    ----------
    columns, rows : their names.
    label : label of the colour bar.
    limits : the values of the first and the last colour; by default the smallest and the largest
        value of the matrix. Limits that begin below 0 are made symmetric around 0, which is white;
        blue is below it and red above it.
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
    cell = _name_cells(ax, [str(name) for name in columns], [shortened(name) for name in rows])
    beyond = ("neither", "min", "max", "both")[(finite.min() < low) + 2 * (finite.max() > high)]
    figure.colorbar(image, ax=ax, label=label, shrink=0.9, extend=beyond)
    if numbers and len(columns) <= _MOST_NUMBERS:
        _write_numbers(ax, values, image, cell)


def _name_cells(ax: Axes, columns: Sequence[str], rows: Sequence[str]) -> tuple[float, float]:
    """Label as many columns and rows as fit; the size of a cell in points, about."""
    beside = 1.0 + max(map(len, rows), default=1) * CHARACTER * 10 / 72  # labels, colour bar
    width, height = inches(ax)
    width = max(72 * (width - beside), 36) / max(len(columns), 1)
    height = max(72 * (height - 0.8), 36) / max(len(rows), 1)
    longest = max(map(len, columns), default=1)
    size = 10 if longest * CHARACTER * 10 + 3 <= width else 8
    every = math.ceil((longest * CHARACTER * size + 3) / width)
    ax.set_xticks(range(0, len(columns), every), columns[::every], fontsize=size)
    size = 10 if height > 15 else 8
    every = math.ceil(1.4 * size / height)
    ax.set_yticks(range(0, len(rows), every), rows[::every], fontsize=size)
    return width, height


def _write_numbers(
    ax: Axes, values: np.ndarray, image: AxesImage, cell: tuple[float, float]
) -> None:
    """The values in one format, in the largest font that fits; none if no font does."""
    texts = numbers_of(values)
    longest = max((len(text) for text in texts.flat), default=0)
    fitting = [
        size
        for size in (8, 7, 6)
        if longest * CHARACTER * size <= 0.88 * cell[0] and 1.2 * size <= cell[1]
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
