"""Random vectors, norms and energy shares against numbers on paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.stability.vectors import energy_shares, seeded_normal, state_norms


def test_random_vectors_belong_to_the_image():
    both = seeded_normal(torch.tensor([4, 9]), (3, 2), 1)
    assert torch.equal(both[1:], seeded_normal(torch.tensor([9]), (3, 2), 1))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, seeded_normal(torch.tensor([4, 9]), (3, 2), 2))
    expected = np.random.default_rng((1, 4)).standard_normal((3, 2))
    np.testing.assert_array_equal(both[0], expected)


def test_norms_and_shares_of_energy():
    vectors = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]])
    assert state_norms(vectors).tolist() == [5.0]
    vectors = torch.tensor([[[3.0, 1.0], [0.0, 4.0], [2.0, 0.0]]])
    shares = energy_shares(vectors, [slice(0, 1), slice(1, 3)])
    np.testing.assert_allclose(shares, [[10 / 30, 20 / 30]], rtol=1e-6)


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError):
        state_norms(torch.zeros(3, 2))
    with pytest.raises(TypeCheckError):
        energy_shares(torch.zeros(3, 2), [slice(0, 1)])
    with pytest.raises(TypeCheckError):
        seeded_normal(torch.tensor([[1, 2]]), (2,))
