"""The style of all figures: panels, lines, points, legends, heat maps.

Lines differ in colour (that of Okabe & Ito, for colour-blind readers), marker and dash, so that
figures are readable in grey. Nulls are thin: in a pale shade of their model's colour, or grey where
all models share them. Figures are made without pyplot, so there is no global state and nothing to
close, and they are drawn in a style of their own (`house_style`): the user's settings of matplotlib
change nothing. A `$` in a name is a dollar sign, never the start of a formula.
"""

from bvit_interp.plotting.images import heat_map, numbers_of, overlay
from bvit_interp.plotting.legends import legend, legend_below
from bvit_interp.plotting.marks import INTERVAL, line, points
from bvit_interp.plotting.panels import (
    HouseFigure,
    blank,
    canvas,
    leave_out_empty,
    log_axis,
    save,
    share_axis,
    step_axis,
    subcanvas,
    title,
)
from bvit_interp.plotting.style import (
    COLOURS,
    DASHES,
    DIVERGING,
    LONGEST_LABEL,
    MARKERS,
    NULL,
    NULL_MARK,
    SEQUENTIAL,
    house_style,
    label_of,
    line_style,
    null_style,
    shortened,
    wrapped,
)

__all__ = [
    "COLOURS",
    "DASHES",
    "DIVERGING",
    "INTERVAL",
    "LONGEST_LABEL",
    "MARKERS",
    "NULL",
    "NULL_MARK",
    "SEQUENTIAL",
    "HouseFigure",
    "blank",
    "canvas",
    "heat_map",
    "house_style",
    "label_of",
    "leave_out_empty",
    "legend",
    "legend_below",
    "line",
    "line_style",
    "log_axis",
    "null_style",
    "numbers_of",
    "overlay",
    "points",
    "save",
    "share_axis",
    "shortened",
    "step_axis",
    "subcanvas",
    "title",
    "wrapped",
]
