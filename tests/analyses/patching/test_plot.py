"""The figure of patching, from the CSV alone."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.patching import Config, measure, plot


def test_the_figure_has_the_numbers_of_the_csv(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(limit=6, tokens=("all", "cls")))
    frame = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    figure = plot(frame)
    maps = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert len(maps) == 2 * 3  # whole states of mode other are not drawn
    rows = frame[(frame["model"] == "a") & (frame["metric"] == "recovered")]
    rows = rows[(rows["mode"] == "same") & (rows["tokens"] == "all")]
    cells = rows[rows["step_from"].notna()]
    matrix = cells.pivot_table(index="step_from", columns="step_to", values="value")
    assert any(each.shape == (12, 12) and np.allclose(each, matrix) for each in maps)
    shifts = rows[rows["step_from"].isna()]
    lines = [np.asarray(line.get_ydata()) for ax in figure.axes for line in ax.lines]
    ends = {ax.get_ylim() for ax in figure.axes if ax.get_xlabel().startswith("shift")}
    assert len(ends) == 1  # one scale
    for column in ("value", "null"):
        assert any(len(ys) == 23 and np.allclose(ys, shifts[column]) for ys in lines)


def test_one_head_alone(tiny, digits):
    config = Config(limit=4, mode=("other",), site="z", unit=1, steps=(1, 3))
    assert plot(measure({"a": tiny}, digits, config)).axes
