"""Energy ranks against numpy's SVD of the very matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.analyses.energy_rank import COLUMNS, Config, measure
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.models.masks import Masks, full, masked


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


@pytest.mark.parametrize("baked", [False, True])
def test_a_step_with_its_own_mask_has_its_own_rank(tiny, digits, baked):
    generator = torch.Generator().manual_seed(0)
    uniform = {
        name: torch.rand(mask.shape, generator=generator) for name, mask in full(tiny).items()
    }
    density = torch.linspace(0.02, 0.9, 12)[:, None, None]
    masks = Masks({name: drawn < density for name, drawn in uniform.items()})
    frame = measure({"m": masked(tiny, masks, baked=baked)}, digits, Config(limit=4))
    weight = tiny.blocks[0].mlp.fc1.weight.detach()
    expected = [rank_by_numpy(weight * mask) for mask in masks["fc1"]]
    assert frame[frame["matrix"] == "fc1"]["rank"].tolist() == expected
    assert len(set(expected)) > 3


def test_centring(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(centred=True))
    tokens = cls_by_forward(tiny, digits)
    expected = [rank_by_numpy(step - step.mean(0)) for step in tokens]
    assert frame[frame["matrix"] == "cls"]["rank"].tolist() == expected
    assert expected != [rank_by_numpy(step) for step in tokens]


@pytest.mark.parametrize("centred", [False, True])
def test_fewer_images_than_columns(tiny, digits, centred):
    """Twelve rows of 32: rank 12 at most, 11 about their mean, and the null is a matrix of that
    many rows."""
    frame = measure({"m": tiny}, digits, Config(limit=12, centred=centred, energy=0.99))
    cls_rows = frame[frame["matrix"] == "cls"]
    rows = 12 - centred
    assert set(cls_rows[["rows", "columns", "full_rank"]].itertuples(index=False, name=None)) == {
        (rows, 32, rows)
    }
    tokens = cls_by_forward(tiny, digits)[:, ::5]
    expected = [rank_by_numpy(step - centred * step.mean(0), 0.99) for step in tokens]
    assert cls_rows["rank"].tolist() == expected
    gaussian = np.random.default_rng(0).normal(size=(200, 12, 32))
    ranks = [rank_by_numpy(g - centred * g.mean(0), 0.99) for g in gaussian]
    assert cls_rows["random_rank"].iloc[0] == pytest.approx(np.mean(ranks), abs=0.6)
    assert cls_rows["random_rank"].iloc[0] <= rows


def test_the_share_of_the_mean(tiny, digits):
    for centred in (False, True):  # the column is the same in both
        frame = measure({"m": tiny}, digits, Config(centred=centred))
        tokens = cls_by_forward(tiny, digits)
        expected = [60 * np.square(step.mean(0)).sum() / np.square(step).sum() for step in tokens]
        np.testing.assert_allclose(
            frame[frame["matrix"] == "cls"]["mean_share"], expected, rtol=1e-6
        )
        assert frame[frame["matrix"] != "cls"]["mean_share"].isna().all()


def test_one_image_has_no_rank_about_its_mean(tiny, digits):
    with pytest.raises(
        UserError, match="the CLS tokens of one image have no rank about their mean"
    ):
        measure({"m": tiny}, digits, Config(limit=1, centred=True))
    assert (measure({"m": tiny}, digits, Config(limit=1))["rank"] >= 1).all()
    two = measure({"m": tiny}, digits, Config(limit=2, centred=True)).set_index("matrix").loc["cls"]
    assert set(two["rank"]) == set(two["full_rank"]) == {1}  # they differ along one line


def test_null_and_shapes(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(limit=40))
    cls_rows = frame[frame["matrix"] == "cls"].iloc[0]
    assert (cls_rows["rows"], cls_rows["columns"], cls_rows["full_rank"]) == (40, 32, 32)
    gaussian = [rank_by_numpy(np.random.default_rng(s).normal(size=(40, 32))) for s in range(50)]
    assert abs(cls_rows["random_rank"] - np.mean(gaussian)) <= 1
    fc1 = frame[frame["matrix"] == "fc1"].iloc[0]
    assert fc1["random_rank"] == pytest.approx(
        rank_by_numpy(np.random.default_rng(0).normal(size=(128, 32))), abs=1
    )


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


def test_rows_and_columns(tiny, stacked, digits):
    frame = measure({"a": tiny, "b": stacked}, digits, Config(limit=8, energy=0.9))
    assert list(frame) == list(COLUMNS)
    assert len(frame) == 3 * 12 + 3 * 3
    for name, steps in (("a", 12), ("b", 3)):
        for matrix in ("fc1", "fc2", "cls"):
            rows = frame[(frame["model"] == name) & (frame["matrix"] == matrix)]
            assert rows["step"].tolist() == list(range(1, steps + 1))
    np.testing.assert_array_equal(frame["share"], frame["rank"] / frame["full_rank"])
    assert set(frame["energy"]) == {0.9}


@pytest.mark.parametrize("energy", [0.0, 1.1, -1.0])
def test_energy_out_of_range(energy):
    with pytest.raises(UserError, match=r"energy must be in \(0, 1\]"):
        Config(energy=energy)
