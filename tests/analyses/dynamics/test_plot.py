"""The figure draws the numbers of the table."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.dynamics import Config, measure, plot


def drawn(ax, values):
    """Whether one of the lines has these values."""
    return any(
        len(line.get_ydata()) == len(values) and np.allclose(line.get_ydata(), values)
        for line in ax.lines
    )


def test_figure_from_the_csv_alone(tiny, tiny_distilled, stacked, digits):
    models = {"a": tiny, "b": stacked, "c": tiny_distilled}
    frame = measure(models, digits, Config(steps=24, limit=20))
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    axes = np.array(figure.axes[:20]).reshape(5, 4)
    by_metric = frame.set_index(["metric", "model", "tokens"]).sort_index()
    metrics = ("norm", "step_size", "update_cosine", "distance_to_trained")
    for row, tokens in enumerate(("cls", "reg", "dist", "patches")):
        for ax, metric in zip(axes[row], metrics, strict=True):
            part = by_metric.loc[metric, "c", tokens].sort_values("step")
            assert drawn(ax, part["value"])
            assert drawn(ax, part["null"]) == (metric != "norm")
    for ax, metric in zip(axes[4], ("participation_ratio", "direction_change"), strict=False):
        assert drawn(ax, by_metric.loc[metric, "a", "cls"].sort_values("step")["value"])
    for metric in ("return_distance", "direction_return_distance"):
        part = by_metric.loc[metric, "a", "cls"].sort_values("step")
        assert drawn(axes[4, 2], part.sort_values("other_step", ascending=False)["value"])
    matrix = axes[4, 3].images[0].get_array()
    np.testing.assert_allclose(matrix, np.asarray(matrix).T)
    cka = frame[frame["metric"] == "cka"].set_index(["model", "step", "other_model", "other_step"])
    # 12 steps of a, 3 of b, 6 of c
    assert matrix.shape == (21, 21)
    assert matrix[4, 13] == cka.loc["a", 5, "b", 2]["value"]


def test_a_stack_alone_has_no_returns(stacked, digits):
    figure = plot(measure({"b": stacked}, digits, Config(limit=5)))
    assert len(figure.axes) == 2 * 4 + 3 + 1  # the last is a colour bar
    assert all(ax.has_data() for ax in figure.axes)
    assert not any(ax.get_xlabel() == "lag p, steps" for ax in figure.axes)


def test_a_part_of_a_table_can_be_drawn(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(limit=5))
    for part in (frame[frame["model"] == "a"], frame[frame["tokens"] != "cls"]):
        figure = plot(part.reset_index(drop=True))
        figure.draw_without_rendering()
        assert all(ax.has_data() for ax in figure.axes)
