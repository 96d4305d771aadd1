"""Lines and points show the numbers of the table, with its intervals, nulls and names."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from drawing import drawn, two_lines

from bvit_interp import plotting

TABLE = pd.DataFrame(
    {"step": [2, 1], "value": [0.6, 0.5], "low": [0.5, 0.2], "high": [0.9, 0.6], "null": [0.1, 0.2]}
)


def test_a_line_has_its_interval_and_its_null():
    _, axes = plotting.canvas()
    ax, style = axes[0, 0], plotting.line_style(0)
    plotting.line(ax, TABLE, "step", style=style, null="null")
    value, null = ax.lines
    assert value.get_xydata().tolist() == [[1, 0.5], [2, 0.6]]  # in the order of the steps
    assert null.get_xydata().tolist() == [[1, 0.2], [2, 0.1]]
    assert null.get_linewidth() < value.get_linewidth()
    (band,) = ax.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners == {(1, 0.2), (1, 0.6), (2, 0.5), (2, 0.9)}


def test_points_have_their_intervals_and_their_nulls():
    _, axes = plotting.canvas()
    ax, style = axes[0, 0], plotting.line_style(0)
    plotting.points(ax, [7, 8], TABLE, style=style, null="null")
    value, null = ax.lines[0], ax.lines[-1]
    assert value.get_xydata().tolist() == [[7, 0.6], [8, 0.5]]
    assert value.get_linestyle() == "None"
    assert null.get_xydata().tolist() == [[7, 0.1], [8, 0.2]]
    (bars,) = ax.collections
    ends = [[[7, 0.5], [7, 0.9]], [[8, 0.2], [8, 0.6]]]
    np.testing.assert_allclose(bars.get_segments(), ends)


def test_a_null_of_all_models_is_grey():
    _, axes = plotting.canvas()
    two_lines(axes[0, 0], [0.1, 0.1])
    first, second = axes[0, 0].lines[1], axes[0, 0].lines[3]
    assert first.get_color() == second.get_color() == plotting.NULL["color"]


@pytest.mark.parametrize("mark", ["line", "points"])
@pytest.mark.parametrize("name", ["_old", "lr$1e-3_wd$5", "a_b^c", r"$\frac{", "$x$"])
def test_names_appear_as_they_are(name, mark):
    figure, axes = plotting.canvas()
    ax, frame = axes[0, 0], pd.DataFrame({"step": [1, 2], "value": [0.5, 0.6]})
    options = {"style": plotting.line_style(0), "label": name, "interval": None}
    if mark == "line":
        plotting.line(ax, frame, "step", **options)
    else:
        plotting.points(ax, [1, 2], frame, **options)
    plotting.title(ax, name)
    plotting.legend(ax)
    plotting.legend_below(figure, [ax])
    drawn(figure)  # a formula that is none would raise here
    written = [ax.title, *ax.get_legend().get_texts(), *figure.legends[0].get_texts()]
    assert [text.get_text() for text in written] == [name] * 3
    assert not any(text.get_parse_math() or text.get_usetex() for text in written)
