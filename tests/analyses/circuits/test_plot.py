"""The figure of circuits, from the CSV alone."""

from __future__ import annotations

import numpy as np
import pytest

from bvit_interp import results
from bvit_interp.analyses.circuits import LABELS, Config, measure, plot


def test_the_figure_has_the_numbers_of_the_csv(tiny, stacked, digits, tmp_path):
    config = Config(
        fractions=(0.3, 0.7),
        groups=4,
        n_fit=6,
        draws=2,
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
        mean = kl[kl["draw"] == "all"]
        np.testing.assert_allclose(drawn, mean.sort_values("fraction")["kl"])
        of_draws = np.sort(kl[kl["draw"] != "all"]["kl"])  # the dots; none for the circuit
        dots = [line for line in axes[0].lines if line.get_marker() == "."]
        assert not len(of_draws) or any(
            len(of_draws) == len(line.get_ydata())
            and np.allclose(np.sort(line.get_ydata()), of_draws)
            for line in dots
        )
    raster = axes[3].images[0].get_array()
    assert raster.shape == (8, 12)
    assert raster.sum() == round(0.7 * 48) * 2
    overlap = rows[(rows["site"] == "mlp_post") & (rows["fraction"] == 0.7)]["overlap"]
    assert any(
        len(line.get_ydata()) == 12 and np.allclose(line.get_ydata(), overlap, equal_nan=True)
        for line in axes[5].lines
    )


def test_a_table_without_draws_is_drawn_as_it_was(tiny, digits):
    """Tables of earlier versions have means alone, and no column of draws."""
    frame = measure({"a": tiny}, digits, Config(fractions=(0.5,), groups=4, n_fit=6, limit=6))
    older = frame[frame["draw"] == "all"].drop(columns="draw")
    lines = {line.get_label(): line for line in plot(older).axes[0].lines}
    means = older[older["step"] == "all"].set_index("condition")
    for condition, label in LABELS.items():
        assert lines[label].get_ydata() == pytest.approx([means.loc[condition, "kl"]])
