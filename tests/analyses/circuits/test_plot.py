"""The figure of circuits, from the CSV alone."""

from __future__ import annotations

import numpy as np

from bvit_interp import results
from bvit_interp.analyses.circuits import LABELS, Config, measure, plot


def test_the_figure_has_the_numbers_of_the_csv(tiny, stacked, digits, tmp_path):
    config = Config(
        fractions=(0.3, 0.7),
        groups=4,
        n_fit=6,
        draws=1,
        limit=6,
        methods=("gradient", "learned"),
        epochs=1,
    )
    results.write_table(measure({"a": tiny, "b": stacked}, digits, config), tmp_path / "c.csv")
    frame = results.read_table(tmp_path / "c.csv")
    axes = plot(frame).axes
    rows = frame[(frame["model"] == "a") & (frame["method"] == "learned")]
    lines = {line.get_label(): line for line in axes[0].lines}
    for condition in ("per-step", "shuffled", "random"):
        kl = rows[(rows["condition"] == condition) & (rows["step"] == "all")]
        drawn = lines[LABELS[condition]].get_ydata()
        np.testing.assert_allclose(drawn, kl.sort_values("fraction")["kl"])
    raster = axes[3].images[0].get_array()
    assert raster.shape == (8, 12)
    assert raster.sum() == round(0.7 * 48) * 2
    overlap = rows[(rows["site"] == "mlp_post") & (rows["fraction"] == 0.7)]["overlap"]
    assert any(
        len(line.get_ydata()) == 12 and np.allclose(line.get_ydata(), overlap, equal_nan=True)
        for line in axes[5].lines
    )
