"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from bvit_interp.analyses.pointing_game import COLUMNS, Config, measure, plot
from bvit_interp.errors import UserError


def test_numbers_of_the_figure(tiny, tiny_te, digits, tmp_path):
    frame = measure({"a": tiny, "b": tiny_te}, digits, Config(limit=12), folder=tmp_path)
    assert list(frame) == list(COLUMNS)
    read = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    figure = plot(read)
    assert len(figure.subfigs) == 1 + 2 + 2  # lines, a heat map and maps of each model
    mean_lines, gains, best_lines = figure.subfigs[0].axes
    by_head = frame[frame["model"] == "a"].groupby("head")["hit_ratio"].apply(list)
    means = frame[(frame["model"] == "b") & (frame["head"] == "mean")]
    np.testing.assert_allclose(mean_lines.lines[3].get_ydata(), means["untrained_hit_ratio"])
    np.testing.assert_allclose(gains.lines[2].get_ydata(), means["gain"])
    np.testing.assert_allclose(gains.lines[3].get_ydata(), means["untrained_gain"])
    band = gains.collections[1].get_datalim(gains.transData)
    assert (band.y0, band.y1) == (means["gain_low"].min(), means["gain_high"].max())
    assert mean_lines.get_ylim() == best_lines.get_ylim()
    np.testing.assert_allclose(mean_lines.lines[0].get_ydata(), by_head["mean"])
    np.testing.assert_allclose(best_lines.lines[0].get_ydata(), by_head["best"])
    np.testing.assert_allclose(best_lines.lines[1].get_ydata(), by_head["best-split"])
    constants = [line.get_ydata()[0] for line in mean_lines.lines[4:]]
    nulls = ["chance", "centre_hit_ratio", "luminance_hit_ratio", "contrast_hit_ratio"]
    assert constants == frame[nulls].iloc[0].tolist()
    shown = figure.subfigs[1].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, [by_head[str(head)] for head in range(4)])
    limits = [panel.axes[0].images[0].get_clim() for panel in figure.subfigs[1:3]]
    single = frame.loc[frame["head"].astype(str).str.isdigit(), "hit_ratio"]
    assert limits == [(single.min(), single.max())] * 2  # one scale
    assert len(plot(read.assign(path=None)).subfigs) == 3


def test_one_map_per_step(tiny, digits, tmp_path):
    config = Config(limit=5, saliency="rollout", n_examples=1)
    figure = plot(measure({"m": tiny}, digits, config, folder=tmp_path))
    assert len(figure.subfigs) == 2  # lines and maps, no heads
    assert len(figure.subfigs[1].axes) == 13
    assert len(figure.subfigs[0].axes) == 2  # no best head


def test_a_table_without_the_nulls_is_refused_in_one_line(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(limit=3, n_examples=0))
    old = frame.drop(columns=["gain", "other_masks", "luminance_hit_ratio"])
    with pytest.raises(UserError, match="the table lacks gain, luminance_hit_ratio"):
        plot(old)
