"""Which gates stay open, against tables on paper."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.circuits.choice import derangement, top_gates, top_of_step, top_units


def test_best_gates_on_paper():
    scores = torch.tensor([[5.0, 1.0, 3.0], [4.0, 2.0, 0.0]])
    assert top_gates(scores, 0.5).tolist() == [[True, False, True], [True, False, False]]
    # sums 9, 3, 3: unit 0 at both steps; the third gate goes to unit 1 (the first of equals) at the
    # first step
    assert top_units(scores, 0.5).tolist() == [[True, True, False], [True, False, False]]
    like = torch.tensor([[True, False, False], [True, True, False]])
    assert top_of_step(scores, like).tolist() == [[True, False, False], [True, True, False]]
    assert top_of_step(scores.flip(0), like).tolist() == [
        [True, False, False],
        [True, False, True],
    ]
    assert top_gates(torch.zeros(2, 3), 0.34).tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("share", [0.1, 0.37, 0.9])
def test_one_circuit_for_all_steps_has_as_many_gates(share):
    scores = torch.rand(12, 7, generator=torch.Generator().manual_seed(0))
    assert top_units(scores, share).sum() == top_gates(scores, share).sum() == round(share * 84)
    # all but one unit are open at every step or at none
    assert ((top_units(scores, share).sum(0) % 12) != 0).sum() <= 1


def test_no_step_keeps_its_place():
    generator = torch.Generator().manual_seed(0)
    for steps in (2, 3, 12):
        for _ in range(10):
            order = derangement(steps, generator)
            assert sorted(order.tolist()) == list(range(steps))
            assert all(own != other for own, other in enumerate(order.tolist()))
    assert derangement(1, generator).tolist() == [0]


@pytest.mark.parametrize(
    ("steps", "gates", "expected"),
    [
        (12, 12 + 3, [0, 4, 8]),
        (12, 12 + 5, [0, 2, 4, 7, 9]),
        (12, 12 + 4, [0, 3, 6, 9]),
        (6, 12, []),
        (5, 5 + 4, [0, 1, 2, 3]),
        (4, 1, [0]),
    ],
)
def test_gates_that_remain_are_at_evenly_spaced_steps(steps, gates, expected):
    """Three units in the order 2, 0, 1: full ones first, then the next at these steps alone."""
    scores = torch.tensor([2.0, 1.0, 3.0]).expand(steps, 3)
    chosen = top_units(scores, gates / (3 * steps))
    full, order = gates // steps, [2, 0, 1]
    for unit in order[:full]:
        assert chosen[:, unit].all()
    assert chosen[:, order[full]].nonzero().flatten().tolist() == expected
    for unit in order[full + 1 :]:
        assert not chosen[:, unit].any()


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        top_gates(torch.ones(3), 0.5)
    with pytest.raises(TypeCheckError):
        top_of_step(torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool))
