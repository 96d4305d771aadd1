"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses import early_exit


def read_back(frame):
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)))


def test_curve_null_saved_and_exits(tiny, stacked, digits, exits_of):
    folders = (exits_of(tiny, (6, 8), "a"), exits_of(stacked, (1,), "b"))
    config = early_exit.Config(exits=folders, n_timed=32, batch_size=16)
    frame = read_back(early_exit.measure({"a": tiny, "b": stacked}, digits, config))
    accuracy, saved, exits = early_exit.plot(frame).axes
    tables = dict(tuple(frame[frame["model"] == "a"].groupby("table")))
    curve = tables["curve"].sort_values("gflops", kind="stable")
    np.testing.assert_allclose(accuracy.lines[0].get_xdata(), curve["gflops"])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), curve["accuracy"])
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), curve["accuracy_null"])
    np.testing.assert_allclose(accuracy.lines[2].get_ydata(), tables["threshold"]["accuracy"])
    timed = tables["threshold"].sort_values("saved_flops", kind="stable")
    np.testing.assert_allclose(saved.lines[0].get_ydata(), timed["saved_time"])
    np.testing.assert_allclose(exits.lines[0].get_ydata(), tables["exit"]["accuracy"])
    np.testing.assert_allclose(exits.lines[1].get_ydata(), tables["exit"]["auroc"])


def test_the_time_of_the_curve_is_shown_where_it_was_measured(tiny, digits, exits_of):
    config = early_exit.Config(
        exits=(exits_of(tiny, (1, 2)),), n_timed=8, timed_batch=4, timed_curve=True
    )
    frame = read_back(early_exit.measure({"m": tiny}, digits, config))
    assert len(early_exit.plot(frame).axes[1].lines[0].get_xdata()) == 51
