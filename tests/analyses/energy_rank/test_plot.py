"""The figure of `energy_rank`, drawn from its CSV alone."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.energy_rank import Config, measure, plot


def from_csv(frame):
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)))


def test_the_lines_are_the_ranks(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(limit=8))
    figure = plot(from_csv(frame))
    for ax, matrix in zip(figure.axes, ("fc1", "fc2", "cls"), strict=True):
        for line, name in zip(ax.lines, "ab", strict=False):
            rows = frame[(frame["model"] == name) & (frame["matrix"] == matrix)]
            np.testing.assert_array_equal(line.get_xdata(), rows["step"])
            np.testing.assert_array_equal(line.get_ydata(), rows["rank"])
        panel = frame[frame["matrix"] == matrix]
        null = panel["random_rank"].iloc[0]
        assert set(ax.lines[2].get_ydata()) == {null}
        assert ax.get_ylim()[1] > max(null, panel["rank"].max())


def test_widths_that_differ_are_drawn_as_shares_with_a_null_each(tiny, tiny_te, make, digits):
    wide = make(name="vit_tiny_patch16_224", depth=3, embed_dim=48)
    frame = measure({"a": tiny, "b": tiny_te, "c": wide}, digits, Config(limit=8))
    ax = plot(from_csv(frame)).axes[1]
    for line, name in zip(ax.lines[:3], "abc", strict=True):
        part = frame[(frame["model"] == name) & (frame["matrix"] == "fc2")]
        np.testing.assert_allclose(line.get_ydata(), part["share"])
    nulls = frame[frame["matrix"] == "fc2"][["random_rank", "full_rank"]].drop_duplicates()
    assert len(ax.lines) == 3 + len(nulls) == 5
    heights = sorted(line.get_ydata()[0] for line in ax.lines[3:])
    np.testing.assert_allclose(heights, sorted(nulls["random_rank"] / nulls["full_rank"]))
    for random, full in zip(nulls["random_rank"], nulls["full_rank"], strict=True):
        assert f"{random} of {full}" in ax.texts[0].get_text()
