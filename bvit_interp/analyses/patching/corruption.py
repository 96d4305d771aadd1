"""Images without their content: shuffled patches or added noise."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.analyses.patching import Corruption


def corrupt(
    images: Float[Tensor, "batch channels height width"],
    index: Int[Tensor, " batch"],
    grid: tuple[int, int],
    corruption: Corruption,
    seed: int = 0,
) -> Float[Tensor, "batch channels height width"]:
    """Corrupted images; an image is always corrupted in the same way.

    Parameters
    ----------
    images : normalised.
    index : positions of the images in the data set.
    grid : rows and columns of patches.
    corruption : shuffle (the patches in random order: their content stays, their place does not) or
        noise (standard Gaussian noise is added: one standard deviation of the pixels over the
        model's training data).
    seed : random seed, together with an image's position.
    """
    corrupted = []
    for image, position in zip(images, index.tolist(), strict=True):
        rng = np.random.default_rng((seed, position))
        if corruption == "noise":
            noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
            corrupted.append(image + torch.from_numpy(noise).to(image))
        else:
            order = torch.from_numpy(rng.permutation(grid[0] * grid[1]))
            corrupted.append(_shuffle(image, grid, order.to(image.device)))
    return torch.stack(corrupted)


def _shuffle(
    image: Float[Tensor, "channels height width"],
    grid: tuple[int, int],
    order: Int[Tensor, " patches"],
) -> Float[Tensor, "channels height width"]:
    """The image with its patches in another order."""
    tiles = image.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (patches, channels, height, width)
    shuffled = tiles[order].unflatten(0, grid).permute(2, 0, 3, 1, 4)
    return shuffled.flatten(3, 4).flatten(1, 2)
