"""Augmentations of activation maximisation: colour, noise and shift, drawn by seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bvit_interp.analyses.features.recipe import Recipe

PAPER_SIZE = 224
"""Image size, in pixels, for which Ghiasi et al. give jitter and total variation."""
PAPER_JITTER = 32
"""Their largest shift, pixels."""


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of one iteration, the same for every image: C copies.

    A copy is ``roll((x - mean) / spread + noise)``.
    """

    mean: Float[Tensor, "copies 3 1 1"]
    """Colour shift, U(-1, 1)."""
    spread: Float[Tensor, "copies 3 1 1"]
    """Colour scale; its logarithm is U(-1, 1)."""
    noise: Float[Tensor, "copies 3 height width"]
    """One number per channel (height and width 1) or per pixel."""
    shift: tuple[int, int]
    """Pixels down and to the right, the same for all copies."""

    def __call__(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images copies 3 height width"]:
        """The augmented copies of each image."""
        mean, spread, noise = (part.to(images) for part in (self.mean, self.spread, self.noise))
        return ((images[:, None] - mean) / spread + noise).roll(self.shift, dims=(-2, -1))


class AugmentationSequence:
    """The augmentations of a run, from a random generator of its own.

    Parameters
    ----------
    recipe : its seed decides the draws.
    size : height and width of the images, pixels.
    """

    def __init__(self, recipe: Recipe, size: tuple[int, int]) -> None:
        in_proportion = round(PAPER_JITTER * min(size) / PAPER_SIZE)
        self.recipe, self.size = recipe, size
        self.jitter = in_proportion if recipe.jitter is None else recipe.jitter
        # the seed itself is that of the start image
        self._generator = torch.Generator().manual_seed(recipe.seed + 1)

    def draw(self, iteration: int) -> Augmentation:
        """The augmentation of the next iteration.

        Parameters
        ----------
        iteration : from 0. The noise falls linearly to 0 at the last iteration (in the code of
            Ghiasi et al. it then starts again).
        """
        recipe, generator = self.recipe, self._generator
        shape = (recipe.n_copies, 3, 1, 1)
        mean, log_spread = (2 * torch.rand(shape, generator=generator) - 1 for _ in range(2))
        noise_shape = shape if recipe.noise == "channel" else (recipe.n_copies, 3, *self.size)
        noise = torch.randn(noise_shape, generator=generator)
        shifts = torch.randint(-self.jitter, self.jitter + 1, (2,), generator=generator)
        down, right = shifts.tolist()
        remaining = (recipe.iterations - 1 - iteration) / recipe.iterations
        return Augmentation(mean, log_spread.exp(), 0.5 * remaining * noise, (down, right))
