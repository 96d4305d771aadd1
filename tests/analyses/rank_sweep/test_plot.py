"""The figure of `rank_sweep`, drawn from its CSV alone."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from bvit_interp.analyses.rank_sweep import Config, measure, plot


@pytest.fixture
def tables(tiny, stacked, digits):
    """All steps cut together, and each by itself."""
    options = {"limit": 10, "ranks": (4, 16, 32), "n_calibration": 9}
    methods, models = ("svd", "whitened", "random"), {"a": tiny, "b": stacked}
    return tuple(
        measure(models, digits, Config(methods=methods, blocks=blocks, **options))
        for blocks in ("all", "each")
    )


def test_curves_and_maps(tables):
    together, single = tables
    csv = pd.concat(tables).to_csv(index=False)
    figure = plot(pd.read_csv(io.StringIO(csv)))
    panels = [ax for ax in figure.axes if ax.get_title()]
    of_a = together[together["model"] == "a"].set_index("method")
    for ax, method in zip(panels[:2], ("svd", "whitened"), strict=True):
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert of_a.loc[method, "accuracy"].tolist() in drawn
        assert of_a.loc["random", "accuracy"].tolist() in drawn  # thin and grey in both
        band = ax.collections[0].get_paths()[0].vertices
        assert {*of_a.loc[method, "low"], *of_a.loc[method, "high"]} <= {*band[:, 1]}
    maps = panels[2:]
    assert [ax.get_title().split(":")[0] for ax in maps] == ["a"] * 3 + ["b"] * 3
    whitened = single[(single["model"] == "a") & (single["method"] == "whitened")]
    np.testing.assert_allclose(
        maps[1].images[0].get_array(), whitened["accuracy"].to_numpy().reshape(12, 3)
    )
    assert [text.get_text() for text in maps[1].get_yticklabels()] == [str(t) for t in range(1, 13)]
    assert len({ax.images[0].get_clim() for ax in maps}) == 1


def test_one_kind_of_rows_alone(tables):
    together, single = tables
    assert len([ax for ax in plot(single).axes if ax.images]) == 6
    random = plot(together[together["method"] == "random"])
    assert len([ax for ax in random.axes if ax.lines]) == 1
