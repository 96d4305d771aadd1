"""Augmentations against numpy, and the distributions they are drawn from."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch

from bvit_interp.analyses.features.augmentations import Augmentation, AugmentationSequence
from bvit_interp.analyses.features.recipe import Recipe


def test_an_augmentation_by_hand():
    images = torch.rand(2, 3, 5, 6)
    mean, spread, noise = torch.rand(4, 3, 1, 1), 1 + torch.rand(4, 3, 1, 1), torch.rand(4, 3, 5, 6)
    views = Augmentation(mean, spread, noise, (2, -1))(images)
    assert views.shape == (2, 4, 3, 5, 6)
    for k, c in np.ndindex(2, 4):
        moved = ((images[k] - mean[c]) / spread[c] + noise[c]).numpy()
        moved = np.roll(np.roll(moved, 2, axis=1), -1, axis=2)
        np.testing.assert_allclose(views[k, c], moved, rtol=1e-6)


def test_the_stream_has_the_distributions_and_the_schedule():
    recipe = Recipe(iterations=400)
    stream = AugmentationSequence(recipe, (32, 32))
    draws = [stream.draw(i) for i in range(400)]
    mean = torch.stack([draw.mean for draw in draws])
    logs = torch.stack([draw.spread for draw in draws]).log()
    assert mean.shape == (400, 8, 3, 1, 1)
    for uniform in (mean, logs):  # U(-1, 1): bounds, mean 0, standard deviation 1 / sqrt 3
        assert -1 <= uniform.min() < -0.99
        assert 0.99 < uniform.max() <= 1
        assert abs(uniform.mean()) < 0.03
        assert abs(uniform.std() - 3**-0.5) < 0.02
    scales = torch.tensor([0.5 * (399 - i) / 400 for i in range(399)])
    unit = torch.stack([draw.noise for draw in draws[:-1]]) / scales.view(-1, 1, 1, 1, 1)
    assert abs(unit.mean()) < 0.03
    assert abs(unit.std() - 1) < 0.03
    assert (
        abs(unit[:100].std() - unit[-100:].std()) < 0.1
    )  # the schedule, not the draws, brings it down
    assert not draws[-1].noise.any()
    shifts = {number for draw in draws for number in draw.shift}
    assert shifts == set(range(-5, 6))  # 32 px at 224 px: 5 at 32 px


def test_noise_a_pixel_and_a_given_jitter():
    draw = AugmentationSequence(Recipe(noise="pixel", jitter=0), (6, 5)).draw(0)
    assert draw.noise.shape == (8, 3, 6, 5)
    assert draw.noise[0, 0].unique().numel() == 30
    assert draw.shift == (0, 0)
    # 32 px at 224 px, in proportion to the shorter side
    for size, jitter in (((224, 224), 32), ((448, 112), 16), ((2240, 4480), 320)):
        assert AugmentationSequence(Recipe(), size).jitter == jitter


def test_the_first_draw_of_the_seed():
    """The generator has the seed + 1: the seed itself is the start image's."""
    draw = AugmentationSequence(Recipe(seed=5, n_copies=2, iterations=4), (32, 32)).draw(0)
    generator = torch.Generator().manual_seed(6)
    mean, log_spread = (2 * torch.rand(2, 3, 1, 1, generator=generator) - 1 for _ in range(2))
    noise = torch.randn(2, 3, 1, 1, generator=generator)
    assert torch.equal(draw.mean, mean)
    assert torch.equal(draw.spread, log_spread.exp())
    torch.testing.assert_close(draw.noise, 0.375 * noise)


def test_wrong_shapes_are_refused():
    draw = AugmentationSequence(Recipe(), (8, 8)).draw(0)
    with pytest.raises(jaxtyping.TypeCheckError):
        draw(torch.rand(3, 8, 8))
    with pytest.raises(jaxtyping.TypeCheckError):
        Augmentation(torch.rand(4, 3, 1, 1), torch.rand(5, 3, 1, 1), draw.noise, (0, 0))
