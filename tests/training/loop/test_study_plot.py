"""The figure of a study, read back from what was drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bvit_interp.results import read_table, write_table
from bvit_interp.training.loop.study_plot import plot


@pytest.fixture
def frame(tmp_path):
    """Two series at two widths; one has three seeds, the other one. As it comes from a CSV."""
    rows = [
        {
            "study": "width",
            "series": series,
            "width": width,
            "seed": seed,
            "ema_accuracy": accuracy,
            "accuracy": 0.9,
            "chance": 0.1,
        }
        for series, width, seed, accuracy in [
            ("bViT", 128, 0, 0.5),
            ("bViT", 128, 1, 0.6),
            ("bViT", 128, 2, 0.7),
            ("bViT", 64, 0, 0.2),
            ("bViT", 64, 1, 0.4),
            ("bViT", 64, 2, 0.3),
            ("ViT", 64, 0, 0.35),
            ("ViT", 128, 0, 0.8),
        ]
    ]
    write_table(pd.DataFrame(rows), tmp_path / "study_width.csv")
    return read_table(tmp_path / "study_width.csv")


def test_lines_are_means_and_bands_one_standard_deviation(frame):
    (ax,) = plot(frame).axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["bViT, 3 seeds"].get_xydata(), [[64, 0.3], [128, 0.6]])
    np.testing.assert_allclose(lines["ViT, one seed"].get_xydata(), [[64, 0.35], [128, 0.8]])
    band = ax.collections[0].get_paths()[0].vertices
    low, high = (
        {width: end(band[band[:, 0] == width, 1]) for width in (64, 128)} for end in (min, max)
    )
    assert low == pytest.approx({64: 0.2, 128: 0.5})
    assert high == pytest.approx({64: 0.4, 128: 0.7})


def test_chance_axis_and_ticks(frame):
    (ax,) = plot(frame).axes
    (null,) = [line for line in ax.lines if line.get_label() == "chance"]
    assert set(null.get_ydata()) == {0.1}
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "width D"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["64", "128"]
    assert ax.get_ylim()[0] == 0
    legend = ax.get_legend() or ax.figure.legends[0]
    assert {text.get_text() for text in legend.get_texts()} == {
        "bViT, 3 seeds",
        "ViT, one seed",
        "chance",
        "standard deviation over seeds",
    }


def test_a_single_run_can_be_drawn(frame):
    plot(frame.iloc[:1]).canvas.draw()
