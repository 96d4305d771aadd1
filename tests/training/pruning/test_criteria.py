"""Magnitude pruning: the schedule of Table 7, what is ranked together, and how many go."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.errors import UserError
from bvit_interp.models.masks import Masks
from bvit_interp.training.pruning import (
    by_step,
)
from bvit_interp.training.pruning.criteria import prune_smallest, prune_to

SHAPES = {
    "qkv": (768, 256),
    "proj": (256, 256),
    "fc1": (1024, 256),
    "fc2": (256, 1024),
}  # of the paper's model


TABLE_7 = {5: 67.23, 10: 89.26, 15: 96.48, 20: 98.85, 25: 99.62, 30: 99.88}


def noise(masks, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(mask.shape, generator=generator) for name, mask in masks.items()}


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_table_7_by_the_schedule_of_the_code(ranking):
    masks = Masks({name: torch.ones(2, *shape, dtype=torch.bool) for name, shape in SHAPES.items()})
    assert len(masks.flat(0)) == 786_432
    for prunings in range(1, 31):
        pruned = prune_smallest(masks, noise(masks, prunings), 0.2, ranking)
        assert all(not (pruned[name] & ~masks[name]).any() for name in masks)  # nested
        masks = pruned
        sparsity = 100 * (1 - float(masks.density().mean()))
        assert sparsity == pytest.approx(100 * (1 - 0.8**prunings), abs=0.001)
        if prunings in TABLE_7:
            assert sparsity == pytest.approx(TABLE_7[prunings], abs=0.01)
        about = by_step._about(masks, prunings, 0.2)
        assert about["expected"] == pytest.approx(about["mask_sparsity"], abs=1e-5)
    assert not torch.equal(masks["qkv"][0], masks["qkv"][1])


def test_the_smallest_of_all_matrices_go_or_of_each():
    masks = Masks(
        {"a": torch.ones(2, 1, 4, dtype=torch.bool), "b": torch.ones(2, 6, dtype=torch.bool)}
    )
    masks["b"][1, 0] = False
    weights = {
        "a": torch.tensor([[[1.0, -2.0, 3.0, -4.0]], [[8.0, 7.0, 6.0, 5.0]]]),
        "b": torch.tensor([[5.0, 6.0, 7.0, 8.0, -0.5, 9.0], [0.0, 1.0, 1.0, 1.0, -2.0, 3.0]]),
    }
    at_once = prune_smallest(masks, weights, 0.2)
    assert at_once["a"].tolist() == [[[False, True, True, True]], [[True] * 4]]  # 1 and -0.5 of ten
    # of nine 7.2 stay: two go, the first two of the equal ones; what was off is not counted
    assert at_once["b"].tolist() == [
        [True, True, True, True, False, True],
        [False, False, False, True, True, True],
    ]
    each = prune_smallest(masks, weights, 0.25, "layer")
    assert each["a"].tolist() == [[[False, True, True, True]], [[True, True, True, False]]]
    assert each["b"].tolist() == [
        [False, True, True, True, False, True],
        [False, False, True, True, True, True],
    ]
    assert masks["a"].all()  # what is given stays as it is


@pytest.mark.parametrize(
    ("n", "rate", "gone"),
    [
        (1, 0.2, 0),
        (2, 0.2, 0),
        (3, 0.2, 1),
        (5, 0.2, 1),
        (7, 0.2, 1),
        (8, 0.2, 2),
        (1, 0.9, 1),
        (0, 0.5, 0),
    ],
)
def test_a_share_of_few_weights(n, rate, gone):
    masks = Masks({"a": torch.arange(9)[None] < n})
    assert int(prune_smallest(masks, {"a": torch.rand(1, 9)}, rate)["a"].sum()) == n - gone


def test_pruning_takes_the_smallest_over_all_layers():
    masks = Masks({"a": torch.ones(1, 4).bool(), "b": torch.ones(1, 2, 2).bool()})
    weights = {"a": torch.tensor([[1.0, -8, 3, 4]]), "b": torch.tensor([[[-0.1, 5], [0.2, 0.3]]])}
    half = prune_to(masks, weights, 0.5)
    assert half["a"].tolist() == [[False, True, True, True]]
    assert half["b"].tolist() == [[[False, True], [False, False]]]
    assert prune_to(half, weights, 0.75)["a"].tolist() == [[False, True, False, False]]
    with pytest.raises(UserError, match="leaves none of the 8"):
        prune_to(masks, weights, 0.95)
