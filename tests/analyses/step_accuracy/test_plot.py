"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses import step_accuracy


def test_each_panel_shows_its_column_and_its_null(tiny, stacked, digits):
    models = {"a": tiny, "b": stacked}
    table = step_accuracy.measure(models, digits, step_accuracy.Config(limit=30))
    frame = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    part = frame[frame["model"] == "a"]
    columns = {
        "accuracy": "chance",
        "agreement": None,
        "true_rank": "true_rank_null",
        "flips": "flips_null",
    }
    axes = step_accuracy.plot(frame).axes
    for ax, (column, null) in zip(axes, columns.items(), strict=True):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), part[column])
        if null:
            np.testing.assert_allclose(ax.lines[1].get_ydata(), part[null])
        verticals = {line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1}
        assert {3, 12} <= verticals
    band = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert {*part["low"].round(9), *part["high"].round(9)} <= {*band.round(9)}


def test_one_step_has_no_panel_of_changes(tiny, digits):
    table = step_accuracy.measure({"a": tiny}, digits, step_accuracy.Config(limit=30))
    figure = step_accuracy.plot(table[table["step"] == 1])
    assert len(figure.axes) == 3  # nothing is known of flips
    null = figure.axes[0].lines[1]
    assert null.get_marker() == "_"  # a line of one point would not be seen
