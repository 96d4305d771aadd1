"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.pointing_game import COLUMNS, Config, measure, plot


def test_numbers_of_the_figure(tiny, tiny_te, digits, tmp_path):
    frame = measure({"a": tiny, "b": tiny_te}, digits, Config(limit=12), folder=tmp_path)
    assert list(frame) == list(COLUMNS)
    read = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    figure = plot(read)
    assert len(figure.subfigs) == 1 + 2 + 2  # lines, a heat map and maps of each model
    mean_lines, best_lines = figure.subfigs[0].axes
    by_head = frame[frame["model"] == "a"].groupby("head")["hit_ratio"].apply(list)
    np.testing.assert_allclose(mean_lines.lines[0].get_ydata(), by_head["mean"])
    np.testing.assert_allclose(best_lines.lines[0].get_ydata(), by_head["best"])
    np.testing.assert_allclose(best_lines.lines[1].get_ydata(), by_head["best-split"])
    constants = [line.get_ydata()[0] for line in mean_lines.lines[2:]]
    assert constants == [frame["chance"].iloc[0], frame["centre_hit_ratio"].iloc[0]]
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
    assert len(figure.subfigs[0].axes) == 1  # no best head
