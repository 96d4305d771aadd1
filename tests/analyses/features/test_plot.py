"""The figure shows the images and the numbers of the table, read back from its CSV."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bvit_interp.analyses.features import Config, measure, plot

QUICK = {"iterations": 2, "limit": 20, "batch_size": 7}


def test_figure_from_the_csv_alone(tiny, stacked, digits, tmp_path):
    config = Config(**QUICK, neurons=(5, 72), steps=(1, 3))
    frame = measure({"a": tiny, "b": stacked}, digits, config, tmp_path)
    read_back = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    figure = plot(read_back)
    pictures = [ax for ax in figure.axes if ax.images]
    assert len(pictures) == 2 * len(frame)
    first = frame.iloc[0]
    np.testing.assert_allclose(
        pictures[0].images[0].get_array(), np.asarray(Image.open(first["path"]))[:, :32] / 255
    )
    reached = f"{first['activation']:.2f}"
    assert pictures[0].get_xlabel() == (reached if first["exceeds_real"] else f"({reached})")
    row, column = map(int, first["top_images"].split()[0].partition(":")[2].split(","))
    below = next(ax for ax in pictures if ax.patches)
    assert below.patches[0].get_xy() == (8 * column - 0.5, 8 * row - 0.5)
    of_a = figure.axes[-2]
    for line, (_, part) in zip(
        of_a.lines, frame[frame["model"] == "a"].groupby("neuron", sort=False), strict=False
    ):
        np.testing.assert_array_equal(
            line.get_ydata(), part["spectral_centroid"].where(part["exceeds_real"] == 1)
        )
    for path in frame["path"]:
        Path(path).unlink()
    figure = plot(read_back)
    assert not any(ax.images for ax in figure.axes)
    assert sum(text.get_text() == "no file" for ax in figure.axes for text in ax.texts) == 2 * len(
        frame
    )


def test_means_and_nulls_of_the_centroids():
    """A table made up: two neurons, one image of which does not count."""
    rows = [
        {"neuron": neuron, "step": step, "spectral_centroid": centroid, "exceeds_real": exceeds}
        for neuron, step, centroid, exceeds in (
            (3, 1, 0.4, 1),
            (3, 2, 0.2, 1),
            (7, 1, 0.3, 1),
            (7, 2, 0.9, 0),
        )
    ]
    shared = {
        "model": "m",
        "activation": 1.0,
        "real_activation": 0.5,
        "start_spectral_centroid": 0.38,
        "spearman_mean": -1.0,
        "spearman_null_low": -0.5,
        "spearman_null_high": 0.5,
        "centroid_null_low": 0.1,
        "centroid_null_high": 0.5,
        "correlation_distance": 0.2,
        "top_images": "0:0,0",
        "patch_grid": "2x2",
        "path": None,
    }
    ax = plot(pd.DataFrame(rows).assign(**shared)).axes[-1]
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["neuron 3"].get_ydata(), [0.4, 0.2])
    np.testing.assert_allclose(lines["neuron 7"].get_ydata(), [0.3, np.nan])
    (mean,) = (line for label, line in lines.items() if label.startswith("mean"))
    np.testing.assert_allclose(mean.get_ydata(), [0.35, 0.2])
    assert lines["start image"].get_ydata()[0] == 0.38
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.1, 0.5)
