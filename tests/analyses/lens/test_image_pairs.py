"""Mean inner products against loops over pairs of images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.lens.image_pairs import ImagePairs


def different(n):
    return [(i, j) for i, j in itertools.product(range(n), repeat=2) if i != j]


def test_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(6, 5, generator=generator), torch.randn(6, 2, 5, generator=generator)
    metric = ImagePairs(2, 5)
    for rows in (slice(0, 4), slice(4, 6)):
        metric.update(one[rows], other[rows])
    found = metric.compute()
    for t in range(2):
        same = [float(one[i] @ other[i, t]) for i in range(6)]
        between = [float(one[i] @ other[j, t]) for i, j in different(6)]
        assert found["same_image"][t].item() == pytest.approx(np.mean(same), rel=1e-5)
        assert found["other_images"][t].item() == pytest.approx(np.mean(between), rel=1e-5)


def test_one_image_has_no_other():
    metric = ImagePairs(1, 3)
    metric.update(torch.ones(1, 3), torch.ones(1, 1, 3))
    assert metric.compute()["same_image"].item() == 3
    assert math.isnan(metric.compute()["other_images"].item())


def test_other_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        ImagePairs(2, 3).update(torch.ones(4, 3), torch.ones(5, 2, 3))
