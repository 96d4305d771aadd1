"""The figure of a search for tickets, read back from what was drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bvit_interp.results import read_table, write_table
from bvit_interp.training.pruning.ticket_plot import plot
from bvit_interp.training.pruning.ticket_table import COLUMNS


@pytest.fixture
def frame(tmp_path):
    """Two methods, two rounds of which the second is scored, two subsets, two layers. As it comes
    from a CSV."""
    rows = []
    for method in ("rtl", "imp"):
        for number, sparsity in ((1, 0.25), (2, 0.5)):
            keys = {
                "method": method,
                "by": "class",
                "round": number,
                "sparsity": sparsity,
                "ratio": 1 - sparsity / 2,
            }
            scored = number == 2
            for k, subset in enumerate(("cat", "dog", "all")):
                right = {"balanced_accuracy": 0.6 + 0.1 * k, "swapped": 0.55} if scored else {}
                rows.append({**keys, "subset": subset, "layer": "all", **right})
            for layer, alike in (
                ("fc1", 0.9 - number / 10),
                ("fc2", 0.5),
                ("mean", 0.7 - number / 20),
            ):
                more = (
                    {"null_similarity": 0.3, "collapsed": float(scored)} if layer == "mean" else {}
                )
                here = {} if method == "imp" else {"similarity": alike, **more}
                rows.append({**keys, "subset": "all", "layer": layer, **here})
    write_table(pd.DataFrame(rows, columns=[*COLUMNS]), tmp_path / "tickets.csv")
    return read_table(tmp_path / "tickets.csv")


def lines_of(ax):
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


def test_methods_are_lines_of_the_scored_rounds_with_all_subsets_as_bars(frame):
    right, large, _ = plot(frame).axes
    lines = lines_of(right)
    np.testing.assert_allclose(lines["a mask per subset (RTL)"][:, 1], [0.8])
    np.testing.assert_allclose(lines["a mask per subset (RTL)"][:, 0], [0.5], atol=0.01)
    assert lines["chance"][0][1] == 0.5
    np.testing.assert_allclose(lines["RTL with the next subset's mask (null)"], [[0.5, 0.55]])
    np.testing.assert_allclose(
        [c.get_segments()[0][:, 1] for c in right.collections], [[0.6, 0.7]] * 2
    )
    np.testing.assert_allclose(lines_of(large)["one mask, one model (IMP)"], [[0.5, 0.75]])


def test_overlap_has_its_layers_its_null_and_its_collapse(frame):
    lines = lines_of(plot(frame).axes[2])
    np.testing.assert_allclose(lines["mean over layers"], [[0.25, 0.65], [0.5, 0.6]])
    np.testing.assert_allclose(lines["each layer"], [[0.25, 0.8], [0.5, 0.7]])
    np.testing.assert_allclose(lines["independent masks (null)"][:, 1], [0.3, 0.3])
    assert lines["collapse"][0][0] == 0.5


def test_without_learned_masks_the_third_panel_says_so(frame):
    only = frame[frame["method"] == "imp"]
    assert [ax.get_title() for ax in plot(only).axes][2] == "No masks of subsets"
