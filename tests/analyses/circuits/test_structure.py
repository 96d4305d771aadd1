"""Open gates and overlaps per step, against paper and all placements."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.circuits.structure import overlaps, random_counts, structure


def test_overlap_on_paper():
    gates = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    # pairs: 1/3, 2/4, 2/4
    torch.testing.assert_close(
        overlaps(gates),
        torch.tensor([(1 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2, 1 / 2], dtype=torch.float64),
    )


def test_nulls_of_the_structure_against_all_placements():
    """Two of four gates at each of two steps: overlap 0, 1/3 or 1 with probability 1/6, 4/6,
    1/6."""
    gates = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    found = structure(gates, 3000, seed=0)
    assert found["kept"].tolist() == [0.5, 0.5]
    assert found["overlap"].tolist() == [1.0, 1.0]
    assert found["overlap_null"].tolist() == pytest.approx([7 / 18] * 2, abs=0.02)
    assert found["overlap_null_low"].tolist() == [0.0, 0.0]
    placed = random_counts(gates, 6000, torch.Generator().manual_seed(0))
    assert (placed.sum(1) == 4).all()
    shares = placed[:, 0].bincount(minlength=5) / 6000  # hypergeometric: 1, 16, 36, 16, 1 of 70
    assert shares.tolist() == pytest.approx([1 / 70, 16 / 70, 36 / 70, 16 / 70, 1 / 70], abs=0.03)


def test_ranges_of_the_nulls_are_quantiles():
    """One open gate of two at each of two steps, and one of 40 at one of 40 steps."""
    gates = torch.tensor([[1, 0], [0, 1]]).bool()
    found = structure(gates, 400, seed=1)
    assert found["overlap"].tolist() == [0.0, 0.0]
    assert found["overlap_null"].tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    assert found["overlap_null_low"].tolist() == [0.0, 0.0]
    assert found["overlap_null_high"].tolist() == [1.0, 1.0]
    # of four places two are drawn: both at one step with probability 1/6, so the range is whole
    assert found["kept_null_low"].tolist() == [0.0, 0.0]
    assert found["kept_null_high"].tolist() == [1.0, 1.0]
    # one of 40 gates, at a given step of 40 with probability 1/40: above the 97.5 % quantile or not
    rare = torch.zeros(80, 1, dtype=torch.bool)
    rare[0, 0] = True
    assert structure(rare, 400, seed=1)["kept_null_high"].mean().item() < 0.1


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        structure(torch.ones(3, dtype=torch.bool), 2, 0)
    with pytest.raises(TypeCheckError):
        overlaps(torch.ones(3, 2))
