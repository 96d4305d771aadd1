"""The figure draws the numbers of the table."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.stability import Config, measure, plot

OPTIONS = {
    "limit": 2,
    "n_jacobian": 1,
    "steps": 3,
    "jacobian_steps": (1,),
    "leading": 2,
    "iterations": 4,
    "starts": (1,),
    "eps": (0.1, 0.2),
}


def only(frame, metric, **where):
    part = frame[frame["metric"] == metric]
    for key, value in where.items():
        part = part[part[key] == value]
    return part


def test_figure_from_the_csv_alone(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(**OPTIONS))
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    local, spectrum, run, far, same, gain = figure.axes
    drawn = [line.get_ydata() for line in local.lines]
    for metric in ("singular_value", "spectral_radius"):
        part = only(frame, metric, model="a")
        for column in ("value", "null"):
            expected = part[part["index"].isna() | (part["index"] == 1)][column].to_numpy()
            assert any(np.array_equal(expected, line) for line in drawn)
    ftle = only(frame, "ftle", model="b")["value"].to_numpy()
    assert any(np.array_equal(ftle, line.get_ydata()) for line in spectrum.lines)
    relative = only(frame, "lyapunov_exponent_relative", model="b", index=1)["value"].to_numpy()
    assert any(np.array_equal(relative, line.get_ydata()) for line in run.lines)
    for ax, metric, more in (
        (far, "direction_distance", {"tokens": "cls"}),
        (same, "same_prediction", {}),
    ):
        curve = only(frame, metric, model="a", source="partner", eps=0.2, **more)[
            "value"
        ].to_numpy()
        assert any(np.array_equal(curve, line.get_ydata()) for line in ax.lines)
    assert [label.get_text() for label in gain.get_xticklabels()] == [
        "CLS\nto CLS",
        "CLS\nto patches",
        "patches\nto CLS",
        "patches\nto patches",
    ]
