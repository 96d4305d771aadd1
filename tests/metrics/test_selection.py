"""Which scores are kept, against tables on paper."""

from __future__ import annotations

import pytest
import torch

from bvit_interp.metrics.selection import drop_smallest, keep_largest

SCORES = torch.tensor([[3, 1, 2], [1, 5, 2]])


@pytest.mark.parametrize(
    ("dim", "largest", "not_smallest"),
    [
        # of all six: of the two equal ones 2 the first is kept, and the first is dropped
        (None, [[1, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, 1, 1]]),
        (1, [[1, 0, 1], [0, 1, 1]], [[1, 0, 0], [0, 1, 0]]),
    ],
)
def test_of_all_scores_and_of_each_row(dim, largest, not_smallest):
    kept = keep_largest(SCORES, 3 if dim is None else 2, dim)
    left = drop_smallest(SCORES, 3 if dim is None else 2, dim)
    assert kept.int().tolist() == largest
    assert left.int().tolist() == not_smallest


def test_of_each_column():
    assert keep_largest(SCORES, 1, dim=0).int().tolist() == [[1, 0, 1], [0, 1, 0]]
    assert drop_smallest(SCORES, 1, dim=0).int().tolist() == [[1, 0, 0], [0, 1, 1]]


def test_none_and_all():
    for dim in (None, 0, 1):
        assert not keep_largest(SCORES, 0, dim).any()
        assert drop_smallest(SCORES, 0, dim).all()
        assert keep_largest(SCORES, 6, dim).all()
        assert not drop_smallest(SCORES, 6, dim).any()
