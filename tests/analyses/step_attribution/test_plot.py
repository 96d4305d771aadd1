"""The figure of `step_attribution`, drawn from its CSV alone."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses.step_attribution import Config, measure, plot

FEW = {"folds": 4, "limit": 12, "batch_size": 5}


def visible(figure):
    return [ax for ax in figure.axes if ax.get_visible() and ax.has_data() and ax.get_title()]


def test_panels_and_lines(tiny, stacked, digits, tmp_path):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(**FEW, sparsities=(0.4, 0.7)))
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    panels = visible(figure)
    assert len(panels) == 6
    figure.savefig(tmp_path / "figure.png", dpi=40)
    of_a = frame[(frame["model"] == "a") & (frame["layer"] == "all")]
    lines = {line.get_label(): line.get_ydata() for line in panels[0].lines}
    np.testing.assert_allclose(lines["all"], of_a.loc[of_a["metric"] == "share", "value"])
    cells = panels[1].images[0].get_array()
    for metric, flip in (("cosine", False), ("cosine_apart", True)):
        for _, row in of_a[of_a["metric"] == metric].iterrows():
            i, j = int(row["step"]) - 1, int(row["other_step"]) - 1
            assert abs(cells[(j, i) if flip else (i, j)] - row["value"]) <= 0.005 + 1e-9
    accuracy = of_a[of_a["metric"] == "accuracy"].set_index("method")["value"]
    curve = next(line for line in panels[4].lines if "Sigma" not in line.get_label())
    expected = [accuracy["none"], *accuracy["magnitude"]]
    np.testing.assert_allclose(curve.get_ydata(), expected)
    assert len(visible(plot(frame[frame["model"] == "b"]))) == 3


def test_without_pruning(tiny, digits):
    frame = measure({"a": tiny}, digits, Config(**FEW, methods=()))
    assert len(visible(plot(frame))) == 5
