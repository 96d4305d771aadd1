"""Corrupted images: the same patches elsewhere, noise of one standard deviation."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.patching.corruption import corrupt


def test_shuffled_patches_are_the_patches_elsewhere():
    image = torch.arange(3 * 8 * 12.0).reshape(1, 3, 8, 12)
    shuffled = corrupt(image, torch.tensor([5]), (2, 3), "shuffle")[0]  # patches of 4 x 4 pixels

    def tiles(x):
        return [
            tuple(x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten().tolist())
            for i in (0, 1)
            for j in (0, 1, 2)
        ]

    assert sorted(tiles(shuffled)) == sorted(tiles(image[0]))
    assert tiles(shuffled) != tiles(image[0])


@pytest.mark.parametrize("corruption", ["shuffle", "noise"])
def test_an_image_is_always_corrupted_alike(images, corruption):
    whole = corrupt(images, torch.tensor([9, 3, 4, 5]), (4, 4), corruption)
    alone = corrupt(images[1:2], torch.tensor([3]), (4, 4), corruption)
    assert torch.equal(whole[1:2], alone)
    assert not torch.equal(alone, corrupt(images[1:2], torch.tensor([4]), (4, 4), corruption))
    assert not torch.equal(
        alone, corrupt(images[1:2], torch.tensor([3]), (4, 4), corruption, seed=1)
    )
    if corruption == "noise":
        assert (whole - images).std().item() == pytest.approx(1, abs=0.03)


def test_wrong_shapes_are_refused(images):
    with pytest.raises(TypeCheckError):
        corrupt(images, torch.tensor([1, 2]), (4, 4), "noise")
