"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from bvit_interp.analyses import evaluate


@pytest.fixture
def frame(tiny, tiny_te, digits):
    """The table of two models, from its CSV."""
    table = evaluate.measure({"a": tiny, "b": tiny_te}, digits, evaluate.Config(limit=30))
    return pd.read_csv(io.StringIO(table.to_csv(index=False)))


def test_accuracies_with_intervals_and_chance(frame):
    ax = evaluate.plot(frame).axes[0]
    overall = frame[frame["bin"] == "all"]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), overall["accuracy"])
    np.testing.assert_allclose(ax.lines[-3].get_xdata(), overall["top5_accuracy"])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]
    chances = [line.get_xdata()[0] for line in ax.lines[-2:]]
    assert chances == [overall["chance"].iloc[0], overall["top5_chance"].iloc[0]]
    (bars,) = ax.collections
    ends = np.array([segment[:, 0] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, overall[["low", "high"]])


def test_reliability(frame):
    ax = evaluate.plot(frame).axes[1]
    bins = frame[(frame["model"] == "b") & (frame["bin"] != "all")]
    np.testing.assert_allclose(ax.lines[1].get_xdata(), bins["confidence"])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), bins["accuracy"])
    np.testing.assert_allclose(ax.collections[1].get_sizes() ** 2, 40_000 * bins["n"] / 30)


def test_without_top5(make, squares):
    table = evaluate.measure({"m": make(num_classes=3)}, squares(), evaluate.Config())
    assert len(evaluate.plot(table).axes) == 2


def test_an_end_of_the_interval_that_rounding_puts_beyond_the_value(frame):
    frame.loc[frame["bin"] == "all", "accuracy"] = [0.0, 1.0]
    frame.loc[frame["bin"] == "all", "low"] = [1e-17, 0.9]
    frame.loc[frame["bin"] == "all", "high"] = [0.1, 1 - 1e-16]
    assert len(evaluate.plot(frame).axes) == 2
