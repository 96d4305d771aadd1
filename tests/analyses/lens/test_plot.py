"""The figure shows the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from bvit_interp.analyses import lens

FAST = lens.Config(n_fit=10, iterations=2, limit=12, batch_size=8)


def rows(frame, of, metric, tokens="cls"):
    part = frame[(frame["model"] == "a") & (frame["metric"] == metric)]
    return part[(part["lens"] == of) & (part["tokens"] == tokens)]


def test_values_nulls_and_example_maps(tiny, stacked, digits, tmp_path):
    models = {"a": tiny, "b": stacked}
    table = lens.measure(models, digits, FAST, folder=tmp_path)
    frame = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    figure = lens.plot(frame)
    panels = ["accuracy", "kl", "calibration_error", "exit_accuracy"]
    for ax, metric in zip(figure.axes, panels, strict=False):
        raw, tuned = rows(frame, "raw", metric), rows(frame, "tuned", metric)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), raw["value"])
        np.testing.assert_allclose(ax.lines[1].get_ydata(), raw["null"])
        np.testing.assert_allclose(ax.lines[2].get_ydata(), tuned["value"])
        shown = "mean_step" if metric == "exit_accuracy" else "step"
        np.testing.assert_allclose(ax.lines[2].get_xdata(), tuned[shown])
    pointing = rows(frame, "raw", "pointing", "patches")
    np.testing.assert_allclose(figure.axes[5].lines[0].get_ydata(), pointing["value"])
    # 6 panels; for each of two models and two examples 2 rows of an image and 7 or 3 steps; bars
    assert len(figure.axes) == 6 + 2 * 2 * (8 + 4) + 2


def test_correlations_are_shown_without_masks(tiny, squares):
    class Unmasked(squares):
        has_masks = False

        def read(self, i):
            return (*super().read(i)[:2], None)

    tiny.reset_classifier(3)
    frame = lens.measure({"a": tiny}, Unmasked(27), FAST)
    shown = lens.plot(frame).axes[5].lines[0].get_ydata()
    np.testing.assert_allclose(shown, rows(frame, "raw", "map_correlation", "patches")["value"])
