"""The figure of `pathways`, drawn from its CSV alone."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.analyses.pathways import Config, measure, plot
from bvit_interp.models.masks import Masks, full, masked


def view(model, density=0.5, seed=0, emptied=()):
    """The model with independent masks; `emptied` names (layer, step from 1) without a weight."""
    every, generator = full(model), torch.Generator().manual_seed(seed)
    thin = {
        name: torch.rand(mask.shape, generator=generator) < density for name, mask in every.items()
    }
    for name, step in emptied:
        thin[name][step - 1] = False
    return masked(model, Masks(thin, every.blocks), baked=True)


def draw(frame):
    return plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))


def rows(frame, metric, **keys):
    chosen = frame[frame["metric"] == metric]
    for key, value in keys.items():
        chosen = chosen[chosen[key] == value]
    return chosen


def drawn_line(line):
    """(1 - density, y) by rising sparsity."""
    return 1 - line.get_xdata()[::-1], line.get_ydata()[::-1]


@pytest.mark.parametrize("emptied", [(), [("fc2", 7)]])
def test_two_runs_over_sparsity(tiny, digits, emptied):
    models = {
        f"{run}/round-{p:02d}": view(tiny, 0.8**p, p, emptied if p == 20 else ())
        for run in ("rtl", "random")
        for p in (1, 13, 20)
    }
    frame = measure(models, digits, Config(limit=10, shuffles=1))
    panels = [ax for ax in draw(frame).axes if ax.get_title()]
    *exclusive, utilisation, overlap, accuracy, weights = panels
    first = frame[frame["model"].str.startswith("rtl")]
    step = rows(first, "specialization", layer="fc1", step=1)
    for line, column in zip(exclusive[2].lines[:2], ("null", "value"), strict=True):
        sparsity, height = drawn_line(line)
        np.testing.assert_allclose(sparsity, step["sparsity"])
        np.testing.assert_allclose(height, step[column])
    largest = rows(first, "specialization")[["value", "null"]].max().max()
    assert all(ax.get_ylim()[1] >= min(largest, 1) for ax in exclusive)
    if emptied:
        (marker,) = exclusive[3].collections[0].get_offsets()
        np.testing.assert_allclose(marker, [1 - step["sparsity"].iloc[2], 1])
        assert exclusive[3].get_ylim()[1] > 1
    bars = rows(frame, "utilisation", layer="all", model="rtl/round-13")["value"]
    np.testing.assert_allclose([bar.get_height() for bar in utilisation.patches], bars)
    assert {"rtl", "random"} < {line.get_label() for line in accuracy.lines}
    lines = {line.get_label(): line for line in (*overlap.lines, *weights.lines)}
    sparsity = rows(first, "weight_sparsity", layer="all")
    np.testing.assert_allclose(drawn_line(lines["rtl"])[1], sparsity["value"])
    np.testing.assert_allclose(drawn_line(lines["one mask for all steps"])[1], sparsity["sparsity"])


def test_a_single_model_has_bars_and_a_map_of_swaps(tiny, digits):
    frame = measure({"m": view(tiny)}, digits, Config(limit=4, swaps=True))
    figure = draw(frame)
    swaps = next(ax for ax in figure.axes if ax.get_xlabel() == "masks of step")
    expected = rows(frame, "swapped").pivot_table(
        index="step", columns="other_step", values="value"
    )
    np.testing.assert_array_equal(swaps.images[0].get_array(), expected)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx(
        rows(frame, "specialization", layer="qkv")["value"].tolist()
    )


def test_a_stack_and_empty_masks_can_be_drawn(stacked, tiny, digits):
    emptied = [("fc2", 3), ("fc2", 4), ("proj", 3)]
    for model in (view(stacked), view(tiny, emptied=emptied)):
        draw(measure({"m": model}, digits, Config(limit=2, shuffles=0)))
