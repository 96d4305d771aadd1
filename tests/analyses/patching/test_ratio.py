"""Ratios of means against numpy and a bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.patching.ratio import RatioOfMeans
from bvit_interp.errors import UserError


def test_the_ratio_against_numpy_and_a_bootstrap():
    rng = np.random.default_rng(0)
    whole = 2 + rng.standard_normal(400)
    gained = 0.7 * whole[:, None] + rng.standard_normal((400, 2)) * [0.5, 2.0]
    metric = RatioOfMeans(2)
    for part in (slice(0, 150), slice(150, 400)):
        metric.update(torch.from_numpy(gained[part]), torch.from_numpy(whole[part, None]))
    found = {key: values.numpy() for key, values in metric.compute().items()}
    ratio = gained.mean(0) / whole.mean()
    half = 1.959964 * (gained - ratio * whole[:, None]).std(0, ddof=1) / np.sqrt(400) / whole.mean()
    np.testing.assert_allclose(found["value"], ratio, rtol=1e-12)
    np.testing.assert_allclose(found["low"], ratio - half, rtol=1e-6)
    np.testing.assert_allclose(found["high"], ratio + half, rtol=1e-6)
    draws = [gained[i].mean(0) / whole[i].mean() for i in rng.integers(0, 400, (4000, 400))]
    np.testing.assert_allclose(half, 1.96 * np.std(draws, axis=0), rtol=0.08)


def test_the_ratio_without_numbers():
    metric = RatioOfMeans(1)
    metric.update(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    alone = metric.compute()
    assert (alone["value"].item(), alone["n"].item()) == (0.5, 1)
    assert alone["low"].isnan().all()
    nothing = RatioOfMeans(1)
    nothing.update(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))
    assert nothing.compute()["value"].isnan().all()
    with pytest.raises(UserError, match="NaN"):
        metric.update(torch.tensor([[torch.nan]]), torch.tensor([[1.0]]))


def test_two_images_of_small_numbers_have_an_interval():
    """On paper: ratio 3/4, residuals -+ 0.75e-4 about it, a mean whole of 2e-4."""
    metric = RatioOfMeans(1)
    metric.update(torch.tensor([[0.0], [3e-4]]).double(), torch.tensor([[1e-4], [3e-4]]).double())
    found = metric.compute()
    assert found["value"].item() == pytest.approx(0.75, rel=1e-6)
    half = 1.959964 * (0.75e-4 * 2**0.5) / 2**0.5 / 2e-4
    assert (found["high"] - found["value"]).item() == pytest.approx(half, rel=1e-5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        RatioOfMeans(2).update(torch.ones(3, 1), torch.ones(3, 1))  # it would broadcast
    with pytest.raises(TypeCheckError):
        RatioOfMeans(2).update(torch.ones(3, 2), torch.ones(4, 2))
