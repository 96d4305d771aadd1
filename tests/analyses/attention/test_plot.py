"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from bvit_interp.analyses.attention import Config, measure, plot
from bvit_interp.results import read_table


def read_back(frame):
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)))


def test_numbers_of_the_figure(tiny, tiny_reg4, digits, tmp_path):
    frame = measure({"a": tiny, "b": tiny_reg4}, digits, Config(limit=12), folder=tmp_path)
    frame.to_csv(tmp_path / "attention.csv", index=False)
    means = frame[(frame["model"] == "a") & (frame["head"] == "mean")].set_index("metric")
    heads = frame[(frame["model"] == "a") & (frame["metric"] == "normalised_entropy")]
    heads = heads[heads["head"] != "mean"].groupby("step")["value"]
    for read in (read_back(frame), read_table(tmp_path / "attention.csv")):
        figure = plot(read)
        assert len(figure.subfigs) == 3 + 2  # lines, shares, correlations, maps of each model
        entropy, distance = figure.subfigs[0].axes
        for ax, metric in ((entropy, "normalised_entropy"), (distance, "normalised_distance")):
            np.testing.assert_allclose(ax.lines[0].get_ydata(), means.loc[metric, "value"])
        band = entropy.collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(heads.min().min())
        assert band.max() == pytest.approx(heads.max().max())
        rollout = means.loc["rollout_entropy", "value"] / np.log(17)
        np.testing.assert_allclose(entropy.lines[1].get_ydata(), rollout)
        bars = figure.subfigs[1].axes[0].containers
        np.testing.assert_allclose(
            [bar.get_height() for bar in bars[0]], means.loc["cls_to_cls", "value"]
        )
        np.testing.assert_allclose(
            [bar.get_y() for bar in bars[1]], means.loc["cls_to_cls", "value"]
        )
        image = figure.subfigs[2].axes[0].images[0]
        assert (image.get_clim(), image.cmap.name) == ((-1, 1), "RdBu_r")
        shown = image.get_array()
        first = means.loc["step_correlation"].iloc[0]
        assert shown[0, 1] == pytest.approx(first["value"])
        assert shown[1, 0] == pytest.approx(first["null"])


def test_maps_are_drawn_where_their_files_exist(tiny, tiny_reg4, digits, tmp_path):
    frame = measure({"a": tiny, "b": tiny_reg4}, digits, Config(limit=5), folder=tmp_path)
    (tmp_path / "attention_a.npz").unlink()
    assert len(plot(frame).subfigs) == 3 + 1
    assert len(plot(frame.assign(path=None)).subfigs) == 3


def test_without_cls_or_with_one_image(make, tiny, digits):
    pooled = make(name="vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg")
    frame = measure({"a": pooled, "b": tiny}, digits, Config(limit=1))
    assert len(plot(read_back(frame)).subfigs) == 3
    alone = plot(read_back(frame[frame["model"] == "a"]))
    assert len(alone.subfigs) == 1
    assert all(ax.has_data() for ax in alone.axes)  # no panel of CLS


def test_maps_that_correlate_with_nothing(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(limit=2))
    correlations = frame["metric"].str.endswith("correlation")
    columns = ["value", "low", "high", "null", "null_other_images", "p_value"]
    frame.loc[correlations, columns] = np.nan
    assert len(plot(read_back(frame)).subfigs) == 3
