"""Sums over folds, their halves and the norm that sampling alone gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.step_attribution.fold_gradients import (
    FoldGradients,
    mean_of_halves,
    sampling_norm,
)
from bvit_interp.analyses.step_attribution.untied import Layout
from bvit_interp.errors import UserError


def test_sums_of_folds(small):
    layout, _, _ = small
    metric = FoldGradients(4, 5, 28)
    rng = torch.Generator().manual_seed(0)
    parts = [
        (fold, torch.randn(5, 28, generator=rng).double(), n)
        for fold, n in ((0, 2), (1, 1), (2, 3), (3, 1), (1, 2))
    ]
    for fold, terms, n in parts[:3]:
        metric.update(fold, terms, n)
    with pytest.raises(UserError, match="a fold of the images is empty"):
        metric.compute()
    for fold, terms, n in parts[3:]:
        metric.update(fold, terms, n)
    total, count = metric.compute()
    assert count.tolist() == [2, 3, 3, 1]
    assert torch.equal(total[1], parts[1][1] + parts[4][1])
    halves, images = mean_of_halves(total, count, without=1)
    assert images.tolist() == [5, 1]
    torch.testing.assert_close(halves[0], (total[0] + total[2]) / 5)
    torch.testing.assert_close(halves[1], total[3])
    means = (total / count[:, None, None]).numpy()
    apart = means - total.sum(0).numpy() / 9
    wanted = np.sqrt((apart[:, :, 4:8] ** 2).sum((0, 2)) / 12)
    np.testing.assert_allclose(sampling_norm(total, count, layout)[:, 1], wanted)
    with pytest.raises(
        UserError, match="sums of 16 folds of images would take 119 GiB: use fewer folds"
    ):
        FoldGradients(16, 100, 10**7)


def test_the_sampling_norm_is_the_norm_of_a_mean_of_noise():
    """Of folds of one image each: the root of the mean squared norm over many data sets."""
    generator = torch.Generator().manual_seed(0)
    none = torch.full((50,), 1)
    layout = Layout((0,), (), (), {"q": slice(0, 50)}, none, none, 50)
    norms, sampled = [], []
    for _ in range(400):
        total = torch.randn(6, 1, 50, generator=generator).double()
        norms.append((total.sum(0) / 6).square().sum().item())
        sampled.append(sampling_norm(total, torch.ones(6), layout)[0, 0].item() ** 2)
    assert np.mean(sampled) == pytest.approx(np.mean(norms), rel=0.05)


def test_sums_of_16_gib_are_kept_and_no_more():
    with torch.device("meta"):  # takes no memory
        assert FoldGradients(4, 2, 2**28).total.numel() * 8 == 16 * 2**30
        with pytest.raises(UserError, match="would take 16 GiB"):
            FoldGradients(1, 1, 2**31 + 1)


def test_wrong_shapes_are_refused():
    metric = FoldGradients(4, 5, 28)
    with pytest.raises(TypeCheckError):
        metric.update(0, torch.zeros(28), 1)
    with pytest.raises(TypeCheckError):
        mean_of_halves(torch.zeros(4, 5, 28), torch.ones(3))
