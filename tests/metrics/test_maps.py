"""Maps over patches, against values worked out by hand or computed another way."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch

from bvit_interp import metrics


def test_entropy_and_distances_by_hand():
    shares = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.25, 0.25, 0]])
    assert metrics.entropy(shares).tolist() == pytest.approx([math.log(4), 0, 1.5 * math.log(2)])
    distances = metrics.grid_distances((2, 3))  # patches 0 1 2 above 3 4 5
    assert distances[0].tolist() == pytest.approx([0, 1, 2, 1, math.sqrt(2), math.sqrt(5)])
    assert torch.equal(distances, distances.T)


def test_unit_maps_correlate_as_in_numpy_and_constant_ones_with_nothing():
    maps = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(9), size=(3, 4))).float()
    for of_image in maps:
        ours = metrics.correlations(metrics.unit_maps(of_image))
        np.testing.assert_allclose(ours, np.corrcoef(of_image.double().numpy()), atol=1e-12)
    maps[1, 2] = torch.full((9,), 1 / 9) * (1 + 1e-7 * torch.arange(9))
    ours = metrics.correlations(metrics.unit_maps(maps[1]))
    assert ours[2].isnan().all()
    assert int(ours.isnan().sum()) == 7


def test_correlations_do_not_depend_on_scale_and_place():
    """One value of the first map is its mean; a spread of 8e-6 of the length is no rounding."""
    maps = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
    for changed in (maps, 1e-9 * maps, 1e5 + maps):
        found = metrics.correlations(metrics.unit_maps(changed))
        np.testing.assert_allclose(found, [[1, -0.5], [-0.5, 1]], atol=1e-6)


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        metrics.entropy(torch.ones(3, dtype=torch.int64))
    with pytest.raises(jaxtyping.TypeCheckError):
        metrics.unit_maps(torch.tensor(1.0))
    with pytest.raises(jaxtyping.TypeCheckError):
        metrics.correlations(torch.rand(9))
