"""Mixup and CutMix against timm, by hand and in distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta as beta_distribution
from scipy.stats import ks_2samp, kstest
from timm.data import Mixup
from timm.data import mixup as timm_mixup

from bvit_interp.training.loop import mixing
from bvit_interp.training.loop.draws import Draws, seeded


def draws_of(n, key=0):
    return Draws([key], 4).table(n)


def test_no_mixing_by_default(recipe):
    mixer = mixing.Mixing(recipe(label_smoothing=0.1), 10)
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    assert not mixer.active
    found, targets = mixer(images, labels, draws_of(4))
    assert found is images and targets is labels


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_targets_are_mixed_as_the_images_are_and_smoothed_once(recipe, alphas):
    """Image i is constant i: its mixture with image 8 - i tells the share, which the target must
    have."""
    labels = torch.arange(9)
    smooth = 0.8 * F.one_hot(labels, 10) + 0.2 / 10
    images = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 16, 16)
    mixer, kinds = mixing.Mixing(recipe(**alphas, label_smoothing=0.2), 10), set()
    for i in range(30):
        mixed, targets = mixer(images, labels, draws_of(9, i))
        torch.testing.assert_close(targets.sum(1), torch.ones(9))
        for own in (0, 1, 2, 3, 5, 6, 7, 8):
            share = (mixed[own].mean() - own) / (8 - 2 * own)  # of image 8 - i in image i
            wanted = (1 - share) * smooth[own] + share * smooth[8 - own]
            torch.testing.assert_close(targets[own], wanted, atol=1e-5, rtol=0)
            if 0 < share < 1:
                kinds.add("cutmix" if len(mixed[own].unique()) == 2 else "mixup")
    assert kinds == set(alphas)
    assert torch.equal(images[:, 0, 0, 0], torch.arange(9.0))  # what is given stays as it is


@pytest.mark.parametrize("size", [(16, 16), (24, 10)])
@pytest.mark.parametrize("alphas", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_the_arithmetic_is_timms_for_given_draws(recipe, monkeypatch, alphas, size):
    """timm is told which of the two, the share and the centre of the box that ours drew."""
    n, draws = 40, draws_of(40, 7)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(n, 3, *size, generator=generator), torch.arange(n) % 10
    found, targets = mixing.Mixing(recipe(**alphas, label_smoothing=0.1), 10)(images, labels, draws)
    theirs = Mixup(
        alphas.get("mixup", 0.0),
        alphas.get("cutmix", 0.0),
        mode="elem",
        label_smoothing=0.1,
        num_classes=10,
    )
    cuts = draws[:, 0] < 0.5 if len(alphas) == 2 else np.full(n, "cutmix" in alphas)
    alpha = np.where(cuts, alphas.get("cutmix", 1.0), alphas.get("mixup", 1.0))
    share = beta_distribution.ppf(draws[:, 1], alpha, alpha)
    centres = iter(
        int(place * side) for row in draws[cuts] for place, side in zip(row[2:4], size, strict=True)
    )
    monkeypatch.setattr(theirs, "_params_per_elem", lambda batch: (share.copy(), cuts))
    monkeypatch.setattr(timm_mixup.np.random, "randint", lambda *given, size=None: next(centres))
    expected, wanted = theirs(images.clone(), labels)
    torch.testing.assert_close(
        found, expected, atol=2e-3, rtol=0
    )  # the share is of a table of 4,097 quantiles
    torch.testing.assert_close(targets, wanted.float(), atol=2e-3, rtol=0)
    assert (found - images).abs().mean() > 0.02


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_shares_are_distributed_as_timms(recipe, alpha, kind):
    """The largest difference of two distribution functions; of Mixup also from Beta itself, as far
    as its ends."""
    n, labels = 4000, torch.arange(4000) % 2
    images = torch.zeros(n, 1, 16, 16)
    mixer = mixing.Mixing(recipe(**{kind: alpha}), n)
    other = (torch.arange(n) != torch.arange(n).flip(0)).nonzero().flatten()
    _, targets = mixer(images, torch.arange(n), draws_of(n, 3))
    ours = targets[other, other].double().numpy()
    with seeded(0):
        theirs_of = Mixup(
            **{f"{kind}_alpha": alpha, "mixup_alpha" if kind == "cutmix" else "cutmix_alpha": 0.0},
            mode="elem",
            label_smoothing=0.0,
            num_classes=2,
        )
        _, mixed = theirs_of(images.clone(), labels)
    own = (
        mixed[torch.arange(n), labels].double().numpy()
    )  # the partner of an even place is an odd one
    assert ks_2samp(ours, own).statistic < 0.045  # 1.95 sqrt(2 / 4000), p < 0.001
    if kind == "mixup":
        assert (
            kstest(ours.clip(1e-6, 1 - 1e-6), beta_distribution(alpha, alpha).cdf).statistic < 0.05
        )
        assert (
            ks_2samp(
                ours, beta_distribution(alpha * 1.5, alpha * 1.5).rvs(n, random_state=0)
            ).statistic
            > 0.045
        )


def test_one_of_the_two_is_drawn_for_each_image(recipe):
    images = torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed, _ = mixing.Mixing(recipe(mixup=1.0, cutmix=1.0), 2)(
        images, torch.zeros(2000).long(), draws_of(2000)
    )
    swapped = (mixed == images) | (mixed == images.flip(0))
    assert swapped.flatten(1).all(1).float().mean() == pytest.approx(0.5, abs=0.04)


def test_batches_do_not_mix_with_each_other(recipe):
    mixer = mixing.Mixing(recipe(mixup=0.5, cutmix=1.0, label_smoothing=0.1), 10)
    images, labels = (
        torch.rand(21, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.arange(21) % 10,
    )
    draws = draws_of(21, 5)
    together, targets = mixer(images, labels, draws, 7)
    for begin in (0, 7, 14):
        own = slice(begin, begin + 7)
        alone, expected = mixer(images[own], labels[own], draws[own])
        assert torch.equal(together[own], alone) and torch.equal(targets[own], expected)
    assert not torch.equal(together, mixer(images, labels, draws)[0])


def test_a_box_of_an_odd_side_has_that_side(recipe, monkeypatch):
    """A share of 1 - (3 / 8)**2 around pixel (4, 4) of 8 x 8: three rows and columns, from 3 to
    5."""
    mixer = mixing.Mixing(recipe(cutmix=1.0), 2)  # Beta(1, 1): the share is the number drawn
    draws = np.array([[0.0, 1 - (3.001 / 8) ** 2, 4.5 / 8, 4.5 / 8]] * 2)
    mixed, targets = mixer(
        torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8), torch.tensor([0, 1]), draws
    )
    assert [*zip(*(place.tolist() for place in mixed[0, 0].nonzero().T), strict=True)] == [
        (r, c) for r in (3, 4, 5) for c in (3, 4, 5)
    ]
    assert targets[0].tolist() == pytest.approx([55 / 64, 9 / 64])
