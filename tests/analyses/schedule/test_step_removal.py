"""What removals leave, against the pseudo-inverse and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.schedule.step_decoding import StepMoments, StepSums
from bvit_interp.analyses.schedule.step_removal import (
    REMOVALS,
    Removal,
    fit_removals,
    without_step,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(states):
    """Sums of states ``(n, T, D)``, in two batches."""
    metric = StepMoments(states.shape[1], states.shape[2])
    for part in states.split(len(states) // 2 + 1):
        for t in range(states.shape[1]):
            metric.update(part[:, None, t], t + 1)
    return metric.compute()


def test_what_a_removal_leaves():
    states = draw(50, 4, 8) * torch.arange(1, 9) + torch.arange(4)[:, None] * draw(4, 8, seed=2)
    sums = moments_of(states)
    found = fit_removals(sums, (0, 1))
    means = states.mean(0)
    differences = (means - means.mean(0)).numpy()
    assert len(found["subspace"].basis) == len(found["random_subspace"].basis) == 3
    np.testing.assert_allclose(
        found["random_subspace"].basis @ found["random_subspace"].basis.T, np.eye(3), atol=1e-12
    )
    # by the pseudo-inverse, where the code has a singular value decomposition
    onto = torch.from_numpy(np.linalg.pinv(differences, rcond=1e-9) @ differences)
    for t in range(4):
        changed = without_step(states[:, t], t + 1, found)
        assert list(changed) == list(REMOVALS)
        far = {name: (tokens - states[:, t]).norm(dim=1) for name, tokens in changed.items()}
        wanted = states[:, t] - (states[:, t] - means.mean(0)) @ onto
        torch.testing.assert_close(changed["subspace"], wanted)
        torch.testing.assert_close(changed["mean"], states[:, t] - means[t] + means.mean(0))
        for name in ("subspace", "mean"):
            torch.testing.assert_close(changed[name].mean(0), means.mean(0))
        torch.testing.assert_close(far["random_scaled"], far["subspace"])
        torch.testing.assert_close(far["random_shift"], far["mean"])
        assert not torch.allclose(changed["random_scaled"], changed["subspace"])


def test_the_sums_after_a_removal_are_those_of_the_states_after_it():
    states, other = draw(50, 4, 8) + draw(4, 8, seed=2), draw(30, 4, 8, seed=4)
    for name, removal in fit_removals(moments_of(states), (0,)).items():
        moved = torch.stack(
            [other[:, t] + removal.change(other[:, t], t + 1) for t in range(4)], dim=1
        )
        found, wanted = removal.applied_to(moments_of(other)), moments_of(moved)
        for key in ("gram", "sums", "count", "means"):
            torch.testing.assert_close(
                getattr(found, key), getattr(wanted, key), msg=f"{name} {key}"
            )


def test_random_directions_by_seed():
    sums = moments_of(draw(20, 3, 6))
    first, again, other = (
        fit_removals(sums, seed)["random_subspace"].basis for seed in ((1, 2), (1, 2), (1, 3))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first.T @ first, other.T @ other)


def test_one_dimension_by_hand():
    """Means of -1 and 3 in one direction of two: the mean state is 1."""
    means = torch.tensor([[-1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    sums = StepSums(torch.eye(2, dtype=torch.float64), 2 * means, torch.full((2,), 2.0).double())
    found = fit_removals(sums, (0,))
    state = torch.tensor([[4.0, 7.0]])
    for step, shift in ((1, 2.0), (2, -2.0)):
        changed = without_step(state, step, found)
        torch.testing.assert_close(changed["subspace"], torch.tensor([[1.0, 7.0]]))
        torch.testing.assert_close(changed["mean"], torch.tensor([[4.0 + shift, 7.0]]))
        assert changed["mean"].dtype == state.dtype
        moved = (changed["random_scaled"] - state).norm().item()
        assert moved == pytest.approx(3, rel=1e-5)


def test_wrong_shapes_are_refused():
    sums = moments_of(draw(5, 3, 4))
    with pytest.raises(TypeCheckError):
        Removal(draw(2, 4), draw(3, 5))
    with pytest.raises(TypeCheckError):
        fit_removals(draw(3, 4), (0,))
    assert fit_removals(sums, (0,))["mean"].basis.shape == (0, 4)


@pytest.mark.parametrize("scale", [1e-8, 1, 1e8])
def test_two_steps_differ_in_one_direction(scale):
    for seed in range(5):
        basis = fit_removals(moments_of(scale * draw(20, 2, 6, seed=seed)), (0,))["subspace"].basis
        assert len(basis) == 1
