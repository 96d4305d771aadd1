"""Sharing of masks worked out on paper, against numpy, and random masks against their nulls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.pathways import ALL_LAYERS as ALL
from bvit_interp.analyses.pathways.sharing import Compared, Sharing
from bvit_interp.models.masks import Masks

# three steps; a has six weights, b two, of which step 2 has none and step 3 all
A = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]], dtype=torch.bool)
B = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool)


def on_paper():
    return Sharing(Masks({"a": A[:, None, :], "b": B[:, :, None]}))


def drawn(density, shapes, seed=0, blocks=None):
    """Independent masks: step t has each weight of component c with probability
    ``density[c][t]``."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        c: torch.rand(len(q), *shapes[c], generator=generator) < torch.tensor(q).view(-1, 1, 1)
        for c, q in density.items()
    }
    return Masks(masks, blocks)


def test_values_on_paper():
    found = on_paper()
    assert found.pairs == [(0, 1), (0, 2), (1, 2)]
    assert found.sizes[ALL].tolist() == [4, 3, 4]
    assert found.weights == {"a": 6, "b": 2, ALL: 8}
    assert found.jaccard("a").value.tolist() == [0.5, 0.25, 0.25]
    assert found.jaccard("b").value.tolist() == [0, 0.5, 0]
    assert found.jaccard(ALL).value.tolist() == [3 / 8, 2.5 / 8, 1.5 / 8]  # 6 J_a + 2 J_b over 8
    assert found.mean_jaccard(ALL).value.item() == pytest.approx(7 / 24)
    assert found.utilisation("a").value.tolist() == [3 / 5, 1 / 5, 1 / 5]
    assert found.utilisation(ALL).value.tolist() == [4 / 7, 2 / 7, 1 / 7]
    assert found.utilisation(ALL).count.tolist() == [7, 7, 7]
    np.testing.assert_array_equal(found.specialization("b").value, [0, math.nan, 1 / 2])
    assert found.specialization(ALL).value.tolist() == pytest.approx([1 / 4, 1 / 3, 2 / 4])
    assert found.weight_sparsity(ALL).value.item() == 1 / 8
    assert found.mean_weight_sparsity().value.item() == (1 / 6 + 0) / 2
    assert (
        found.least_weight_sparsity("a") == found.least_weight_sparsity(ALL) == 0
    )  # eight, and three, for six and for two weights
    assert found.mean_uses(ALL).value.item() == 11 / 7


def test_nulls_on_paper():
    found = on_paper()
    q = (1 / 2, 1 / 2, 1 / 3)  # of a
    unused = 1 / 2 * 1 / 2 * 2 / 3
    assert found.specialization("a").null.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 4])
    assert found.jaccard("a").null.tolist() == pytest.approx(
        [1 / 3, (1 / 6) / (2 / 3), (1 / 6) / (2 / 3)]
    )
    assert found.weight_sparsity("a").null.item() == pytest.approx(unused)
    assert found.weight_sparsity(ALL).null.item() == pytest.approx((6 * unused + 2 * 0) / 8)
    assert found.mean_uses("a").null.item() == pytest.approx(sum(q) / (1 - unused))
    std = math.sqrt(unused * (1 - unused) / 6)  # of the share of unused weights
    assert found.mean_uses("a").null_std.item() == pytest.approx(sum(q) / (1 - unused) ** 2 * std)
    assert found.mean_uses("a").count.item() == 5
    once = 1 / 2 * 1 / 2 * 2 / 3 * 2 + 1 / 2 * 1 / 2 * 1 / 3
    thrice = 1 / 2 * 1 / 2 * 1 / 3
    expected = [once, 1 - unused - once - thrice, thrice]
    assert found.utilisation("a").null.tolist() == pytest.approx(
        [p / (1 - unused) for p in expected]
    )
    # b: densities 1/2, 0, 1; step 1's weight is exclusive with (1 - 0)(1 - 1) = 0, step 3's with
    # 1/2
    assert found.specialization(ALL).null.tolist() == pytest.approx(
        [3 / 4 * 1 / 3, 1 / 3, 2 / 4 * 1 / 4 + 2 / 4 * 1 / 2]
    )
    half = 1.959964 * math.sqrt(unused * (1 - unused) / 6)
    (row,) = found.weight_sparsity("a").rows()  # the lower end of the interval would be negative
    assert row == pytest.approx(
        {"value": 1 / 6, "null": unused, "null_low": 0, "null_high": unused + half, "n": 6}
    )


def test_empty_masks_by_every_convention():
    empty = torch.zeros(3, 1, 2, dtype=torch.bool)
    empty[0, 0, 0] = True
    found = Sharing(Masks({"a": A[:, None, :], "b": empty}))
    np.testing.assert_array_equal(
        found.jaccard("b").value, [0, 0, math.nan]
    )  # only of two empty masks is there none
    for value in (0.0, 1.0):
        assert found.jaccard("b", value).value.tolist() == [0, 0, value]
        assert found.jaccard("b", value).null[2].item() == value
        assert found.jaccard(ALL, value).value[2].item() == (6 * 0.25 + 2 * value) / 8
    assert found.jaccard(ALL).value[2].item() == 0.25  # left out, with its weight
    assert found.mean_jaccard(ALL).value.item() == pytest.approx(
        (6 * 1.0 + 2 * 0) / (3 * 6 + 2 * 2)
    )
    assert found.mean_jaccard(ALL, 1.0).value.item() == pytest.approx((6 * 1.0 + 2 * 1) / 24)
    np.testing.assert_array_equal(found.specialization("b").value, [1, math.nan, math.nan])
    assert found.specialization("b").fill_undefined(1.0).value.tolist() == [1, 1, 1]
    assert found.specialization(ALL).value[1].item() == 1 / 3
    nothing = Sharing(Masks({"a": torch.zeros(2, 1, 4, dtype=torch.bool)}))
    assert nothing.weight_sparsity(ALL).value.item() == nothing.least_weight_sparsity(ALL) == 1
    assert all(
        x.value.isnan().all()
        for x in (nothing.utilisation(ALL), nothing.mean_jaccard(ALL), nothing.mean_uses(ALL))
    )


@pytest.mark.parametrize("blocks", [None, (0, 1, 0, 1, 0, 1)])
def test_random_masks_lie_within_their_nulls_about_as_often_as_said(blocks):
    """300 draws of six steps: of every number 95 % within its interval at least (it is a little too
    wide), not all."""
    density = {"a": [0.1, 0.5, 0.3, 0.2, 0.2, 0.7], "b": [0.05, 0.1, 0.6, 0.2, 0.3, 0.02]}
    shapes = {"a": (40, 30), "b": (30, 70)}
    measures = {
        "specialization": lambda x: x.specialization(ALL),
        "jaccard": lambda x: x.jaccard("a"),
        "jaccard of all": lambda x: x.jaccard(ALL),
        "mean jaccard": lambda x: x.mean_jaccard(ALL),
        "utilisation": lambda x: x.utilisation("b"),
        "weight sparsity": lambda x: x.weight_sparsity(ALL),
        "by layer": lambda x: x.mean_weight_sparsity(),
        "uses": lambda x: x.mean_uses(ALL),
    }
    inside, deviation = {name: [] for name in measures}, {name: [] for name in measures}
    for seed in range(300):
        found = Sharing(drawn(density, shapes, seed, blocks))
        for name, measure in measures.items():
            compared = measure(found)
            kept = ~compared.value.isnan() & (compared.null > 0)
            rows = [
                row
                for row, keep in zip(compared.rows(0, math.inf), kept.reshape(-1), strict=True)
                if keep
            ]
            inside[name] += [row["null_low"] <= row["value"] <= row["null_high"] for row in rows]
            deviation[name].append(
                ((compared.value - compared.null) / compared.null_std)[kept].mean().item()
            )
    for name in measures:
        assert 0.93 <= np.mean(inside[name]) <= 1, name
        assert abs(np.mean(deviation[name])) < 0.2, name
    assert np.mean(inside["jaccard"]) < 0.999


def test_a_mask_for_all_steps_is_far_from_independent():
    mask = drawn({"a": [0.1]}, {"a": (50, 40)})["a"].expand(12, -1, -1)
    found = Sharing(Masks({"a": mask}))
    assert found.mean_jaccard("a").value.item() == 1
    assert found.mean_jaccard("a").rows()[0]["null_high"] < 0.1
    assert found.specialization("a").value.sum() == 0
    assert found.utilisation("a").value.tolist() == [0] * 11 + [1]
    assert found.mean_uses("a").value.item() == pytest.approx(12)


def test_steps_of_different_blocks_are_never_compared():
    masks = drawn({"a": [0.5] * 4}, {"a": (10, 10)}, blocks=(0, 1, 0, 1))
    found = Sharing(masks)
    assert found.pairs == [(0, 2), (1, 3)]
    first, second = (Sharing(Masks({"a": masks["a"][b::2]})) for b in (0, 1))
    assert found.weights[ALL] == 200
    np.testing.assert_array_equal(
        found.specialization("a").value[::2], first.specialization("a").value
    )
    assert (
        found.weight_sparsity(ALL).value
        == (first.weight_sparsity(ALL).value + second.weight_sparsity(ALL).value) / 2
    )
    assert (
        found.mean_jaccard(ALL).value
        == (first.mean_jaccard(ALL).value + second.mean_jaccard(ALL).value) / 2
    )
    alone = Sharing(Masks({"a": masks["a"]}, (0, 1, 2, 3)))  # a stack: no step shares its weights
    assert alone.pairs == []
    assert alone.mean_jaccard(ALL).value.isnan()
    assert (
        alone.specialization(ALL).value.tolist()
        == alone.specialization(ALL).null.tolist()
        == [1] * 4
    )
    assert alone.utilisation(ALL).value.tolist() == [1, 0, 0, 0]
    assert alone.weight_sparsity(ALL).value == pytest.approx(1 - masks["a"].double().mean().item())


@pytest.mark.parametrize(
    ("rounds", "least"), [(5, 0), (10, 0), (15, 57.8), (20, 86.2), (25, 95.5), (30, 98.51)]
)
def test_the_least_possible_column_beside_table_7(rounds, least):
    """Twelve masks of 0.8^p of a hundred thousand weights: without overlap the union is twelve
    times as large."""
    mask = torch.zeros(12, 1, 100_000, dtype=torch.bool)
    mask[:, :, : round(1e5 * 0.8**rounds)] = True
    found = Sharing(Masks({"a": mask}))
    assert 100 * found.least_weight_sparsity(ALL) == pytest.approx(least, abs=0.051)
    assert 100 * (1 - found.sizes[ALL].mean().item() / 1e5) == pytest.approx(
        100 * (1 - 0.8**rounds), abs=1e-3
    )
    assert found.weight_sparsity(ALL).null.item() > found.least_weight_sparsity(ALL) - 1e-9


def test_weighted_mean_and_difference_on_paper():
    """Two layers of two numbers; the second number of the first layer is undefined."""
    numbers = torch.tensor
    found = Compared(
        numbers([[0.5, math.nan], [0.2, 0.4]]).double(),
        numbers([[0.1, 0.9], [0.3, 0.3]]).double(),
        numbers([[0.03, 0.5], [0.04, 0.02]]).double(),
        numbers([[10, 20], [30, 40]]).double(),
    )
    mean = found.mean(numbers([[3.0, 3.0], [1.0, 1.0]]))
    assert mean.value.tolist() == pytest.approx([(3 * 0.5 + 0.2) / 4, 0.4])
    assert mean.null.tolist() == pytest.approx([(3 * 0.1 + 0.3) / 4, 0.3])
    assert mean.null_std.tolist() == pytest.approx([math.hypot(0.09, 0.04) / 4, 0.02])
    assert mean.count.tolist() == [40, 60]
    apart = mean.minus(mean.map(lambda column: 2 * column))
    assert apart.value.tolist() == pytest.approx([-(3 * 0.5 + 0.2) / 4, -0.4])
    assert apart.null_std.tolist() == pytest.approx((5**0.5 * mean.null_std).tolist())


def test_wrong_shapes_are_refused():
    three, two = torch.zeros(3).double(), torch.zeros(2).double()
    with pytest.raises(TypeCheckError):
        Compared(three, three, three, two)
    with pytest.raises(TypeCheckError):
        Compared.shares(three, two, three)
