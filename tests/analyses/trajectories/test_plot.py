"""The figure draws the points of the table."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.trajectories import Config, measure, plot


def test_figure_from_the_csv_alone(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(methods=("pca",), neighbours=3))
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert len(panels) == 2 * 10
    of_class = frame[(frame["model"] == "a") & (frame["label"] == panels[2].get_title())]
    means = of_class.groupby("step")[["x", "y"]].mean()
    np.testing.assert_allclose(panels[2].lines[-1].get_xydata(), means, rtol=1e-6)
    np.testing.assert_array_equal(panels[2].collections[1].get_array(), of_class["step"])
    assert [text.get_text() for text in panels[2].texts] == ["1", "12"]


def test_a_table_of_neighbours_among_all_steps_can_be_drawn(tiny, digits):
    """Tables of earlier versions have that share, under a name of its own."""
    frame = measure({"a": tiny}, digits, Config(methods=("pca",), neighbours=3))
    older = frame.rename(columns=lambda name: name.replace("same_step_class", "same_class"))
    for table in (frame, older):
        share = table.filter(regex="class_share$").iloc[:, 0].mean()
        assert f"{share:.2f}" in plot(table).get_suptitle()
