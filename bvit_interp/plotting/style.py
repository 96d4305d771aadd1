"""The settings, colours and labels that all figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.colors import to_rgb

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
NULL: dict[str, Any] = {"color": "0.45", "linewidth": 1.0}
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
"""For values below and above 0, which is white."""
NULL_MARK, BAND_MARK = "null", "band"
"""`gid` of an artist that is a null or a band; `legend` sorts its entries by it."""
LONGEST_LABEL = 44  # characters
CHARACTER = 0.6
"""Mean width of a character, as a share of the font size."""
NOT_HIDDEN = "\u200b"  # matplotlib hides labels that begin with "_"

_STYLE: dict[str, Any] = {"text.parse_math": False}
_IN_STYLE: ContextVar[bool] = ContextVar("in_style", default=False)


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
    """A name as the label of an artist: matplotlib hides labels that begin with "_"."""
    text = str(name)
    return NOT_HIDDEN + text if text.startswith("_") else text


def wrapped(text: str, most: int) -> str:
    """A text in lines of at most `most` characters; line breaks are kept, long names broken."""
    lines = [textwrap.fill(part, most, break_on_hyphens=False) for part in text.splitlines()]
    return "\n".join(lines)


def shortened(label: object) -> str:
    """A label of at most `LONGEST_LABEL` characters; of a longer one, its end."""
    text = str(label)
    return text if len(text) <= LONGEST_LABEL else f"...{text[3 - LONGEST_LABEL :]}"
