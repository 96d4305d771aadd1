"""Energy ranks against numpy's SVD of the very matrices."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.analyses.energy_rank import COLUMNS, Config, measure, plot
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError


def rank_by_numpy(matrix, energy=0.95):
    squared = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(squared) / squared.sum() >= energy)) + 1


def cls_by_forward(model, data):
    """CLS tokens after every step ``(T, n, D)`` from timm's own extraction."""
    geometry = Geometry.of(model, data)
    images = torch.stack([geometry(data.read(i)[0], None)[0] for i in range(len(data))])
    with torch.no_grad():
        pairs = model.forward_intermediates(
            images, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )
    return np.stack([prefix[:, 0].double().numpy() for _, prefix in pairs])


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_weights_and_cls_against_numpy(any_model, digits, energy):
    frame = measure({"m": any_model}, digits, Config(energy=energy, batch_size=9))
    for matrix in ("fc1", "fc2"):
        ranks = [
            rank_by_numpy(getattr(any_model.blocks[t].mlp, matrix).weight.detach(), energy)
            for t in range(len(any_model.blocks))
        ]
        assert frame[frame["matrix"] == matrix]["rank"].tolist() == ranks
    expected = [rank_by_numpy(tokens, energy) for tokens in cls_by_forward(any_model, digits)]
    assert frame[frame["matrix"] == "cls"]["rank"].tolist() == expected


def test_centring(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(centred=True))
    tokens = cls_by_forward(tiny, digits)
    expected = [rank_by_numpy(step - step.mean(0)) for step in tokens]
    assert frame[frame["matrix"] == "cls"]["rank"].tolist() == expected
    assert expected != [rank_by_numpy(step) for step in tokens]


def test_null_and_shapes(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(limit=40))
    of_cls = frame[frame["matrix"] == "cls"].iloc[0]
    assert (of_cls["rows"], of_cls["columns"], of_cls["full_rank"]) == (40, 32, 32)
    gaussian = [rank_by_numpy(np.random.default_rng(s).normal(size=(40, 32))) for s in range(50)]
    assert abs(of_cls["random_rank"] - np.mean(gaussian)) <= 1
    fc1 = frame[frame["matrix"] == "fc1"].iloc[0]
    assert fc1["random_rank"] == pytest.approx(rank_by_numpy(np.random.default_rng(0).normal(size=(128, 32))), abs=1)


def test_a_gaussian_weight_has_the_null_rank_and_a_flat_one_has_rank_one(make, digits):
    model = make()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.blocks[0].mlp.fc2.weight.fill_(0.1)
    frame = measure({"m": model}, digits, Config(limit=4)).groupby("matrix").first()
    assert abs(frame.loc["fc1", "rank"] - frame.loc["fc1", "random_rank"]) <= 1
    assert frame.loc["fc2", "rank"] == 1


def test_nan_activations_are_an_error(tiny, digits):
    with torch.no_grad():
        tiny.pos_embed[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        measure({"m": tiny}, digits, Config(limit=2))


def test_columns_and_figure_from_the_csv_alone(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(limit=8))
    assert list(frame) == list(COLUMNS)
    assert len(frame) == 3 * 12 + 3 * 3
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    drawn = figure.axes[2].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, frame[(frame["model"] == "a") & (frame["matrix"] == "cls")]["rank"])


@pytest.mark.parametrize("energy", [0.0, 1.1, -1.0])
def test_energy_out_of_range(energy):
    with pytest.raises(UserError, match=r"energy must be in \(0, 1\]"):
        Config(energy=energy)
