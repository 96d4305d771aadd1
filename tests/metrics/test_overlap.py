"""Masks compared, against values worked out by hand or computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import stats

from bvit_interp import metrics

nan = math.nan


ON_PAPER = torch.tensor(
    [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]], dtype=torch.bool
)


def test_masks_worked_out_on_paper():
    shared = metrics.jaccard(ON_PAPER)
    assert shared.tolist() == [[1, 0.5, 0.25], [0.5, 1, 0.25], [0.25, 0.25, 1]]
    assert metrics.specialization(ON_PAPER).tolist() == [1 / 3, 1 / 3, 1 / 2]
    assert metrics.utilisation(ON_PAPER).tolist() == [1, 3, 1, 1]


def test_empty_masks_have_no_specialization_and_two_of_them_no_overlap():
    masks = torch.stack([ON_PAPER[0], *torch.zeros(2, 6, dtype=torch.bool)])
    np.testing.assert_array_equal(metrics.specialization(masks), [1, nan, nan])
    np.testing.assert_array_equal(metrics.jaccard(masks), [[1, 0, 0], [0, nan, nan], [0, nan, nan]])
    assert metrics.utilisation(masks).tolist() == [3, 3, 0, 0]
    empty = metrics.independent_jaccard(torch.tensor([0.5, 0, 0]).double())
    assert [empty[0, 1], empty[1, 2].isnan()] == [0, True]


def test_independent_masks_by_hand_and_by_enumeration():
    q = torch.tensor([0.5, 0.2, 0.9, 0.0]).double()
    assert metrics.independent_jaccard(q)[0, 1] == pytest.approx(0.1 / 0.6)
    assert metrics.independent_specialization(q).tolist() == pytest.approx([0.08, 0.05, 0.4, 0.04])
    by_number = np.zeros(5)
    for active in np.ndindex(2, 2, 2, 2):
        by_number[sum(active)] += np.prod(np.where(active, q, 1 - q))
    np.testing.assert_allclose(metrics.independent_utilisation(q), by_number, atol=1e-15)
    twelve = metrics.independent_utilisation(torch.full((12,), 0.3, dtype=torch.float64))
    np.testing.assert_allclose(twelve, stats.binom.pmf(range(13), 12, 0.3), atol=1e-12)


def test_random_masks_of_the_same_densities_show_what_independence_says():
    q = torch.linspace(0.05, 0.6, 12).double()
    masks = torch.rand(12, 40_000, generator=torch.Generator().manual_seed(0)) < q[:, None]
    off = ~torch.eye(12, dtype=torch.bool)
    np.testing.assert_allclose(
        metrics.jaccard(masks)[off], metrics.independent_jaccard(q)[off], atol=0.02
    )
    np.testing.assert_allclose(
        metrics.specialization(masks), metrics.independent_specialization(q), atol=0.02
    )
    np.testing.assert_allclose(
        metrics.utilisation(masks) / 40_000, metrics.independent_utilisation(q), atol=0.01
    )


@pytest.mark.parametrize(
    ("rounds", "independent", "uses"),
    [
        (5, 0.9, 3.97),
        (10, 25.6, 1.73),
        (15, 65.1, 1.21),
        (20, 87.0, 1.07),
        (25, 95.6, 1.02),
        (30, 98.5, 1.01),
    ],
)
def test_the_independent_column_beside_table_7(rounds, independent, uses):
    """12 masks of density 0.8^p: the weight-level sparsity, %, and the mean steps of an active
    weight."""
    density = torch.full((12,), 0.8**rounds).double()
    unused = metrics.independent_utilisation(density)[0].item()
    assert 100 * unused == pytest.approx(independent, abs=0.051)
    assert density.sum().item() / (1 - unused) == pytest.approx(uses, abs=0.0051)


def test_wrong_shapes_are_refused():
    for measure in (metrics.jaccard, metrics.specialization, metrics.utilisation):
        with pytest.raises(TypeCheckError):
            measure(ON_PAPER[0])
        with pytest.raises(TypeCheckError):
            measure(ON_PAPER.float())
    for null in (metrics.independent_jaccard, metrics.independent_specialization):
        with pytest.raises(TypeCheckError):
            null(torch.zeros(2, 3))
