"""The figure shows what the table says, also read back from CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.schedule import Config, measure, plot

SMALL = {"limit": 24, "n_scored": 2, "n_matrix": 1, "runs": (6, 14), "shifts": (1,)}


def rows(frame, model, variant, metric):
    chosen = (frame["model"] == model) & (frame["variant"] == variant)
    return frame[chosen & (frame["metric"] == metric)]


def test_the_figure_from_the_csv_alone(tiny, tiny_te, stacked, digits):
    frame = measure({"a": tiny, "b": tiny_te, "c": stacked}, digits, Config(**SMALL))
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    skipped, swapped, whole, decoding, subspace, _, first, second = figure.axes[:8]
    lines = [line.get_ydata() for line in skipped.lines[:2]]
    for found, variant in zip(lines, ("skip", "repeat"), strict=True):
        wanted = rows(frame, "a", variant, "accuracy")["value"]
        np.testing.assert_allclose(found, wanted.astype(float))
    wanted = rows(frame, "c", "swap", "accuracy")["value"]
    np.testing.assert_allclose(swapped.lines[2].get_ydata(), wanted.astype(float))
    labels = [label.get_text() for label in whole.get_xticklabels()]
    assert labels == [
        "normal",
        "mean embedding",
        "lag 1",
        "lead 1",
        "delay 1",
        "reverse",
        "twice",
        "run 6",
        "run 14",
    ]
    longest = rows(frame, "b", "run", "accuracy")["value"].iloc[-1]
    assert whole.containers[1].lines[0].get_ydata()[-1] == longest
    labels = [label.get_text() for label in decoding.get_xticklabels()]
    assert labels[:2] == ["cls: state", "cls: direction"]
    assert len(labels) == 10
    read = rows(frame, "a", "norm", "accuracy")
    wanted = read[read["step"].isna() & (read["tokens"] == "cls")]["value"].item()
    assert decoding.containers[0].lines[0].get_ydata()[2] == wanted
    wanted = rows(frame, "a", "random_scaled", "log_prob_change")["value"]
    np.testing.assert_allclose(subspace.lines[1].get_ydata(), wanted.astype(float))
    for ax, model in ((first, "b"), (second, "c")):  # the steps of a are all the same function
        shown = ax.images[0].get_array()
        wanted = rows(frame, model, "replace", "log_prob_change").set_index(["other_step", "step"])
        assert shown[2, 0] == wanted.loc[(3, 1), "value"]
    low, high = first.images[0].get_clim()
    assert (low, high) == second.images[0].get_clim() and low == -high  # one scale, around 0
    figure.draw_without_rendering()


def test_a_table_without_runs_and_shifts_can_be_drawn(tiny, digits):
    figure = plot(measure({"a": tiny}, digits, Config(limit=6, runs=(), shifts=())))
    assert len(figure.axes) == 6  # no empty panel stays
    assert all(ax.has_data() for ax in figure.axes)
