"""Training batches that go through the subsets of the data in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from bvit_interp.errors import UserError
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.augment import Augmentation
from bvit_interp.training.loop.draws import Draws
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning.subsets import Part, Pool


class Batches(Dataset[feed.Share | str]):
    """Batch j belongs to part ``j mod K``; each pass over the images of a part has a new order.

    In the batches of a class, half of the images are of the class and half are not. Every random
    draw is a function of the seed, `key`, the part and the number of passes over its images.

    Parameters
    ----------
    recipe : its batch size and seed are used.
    pool : the training images.
    parts : the subsets.
    view : the augmentation.
    key : further numbers that the draws depend on.
    total : number of batches.
    """

    def __init__(
        self,
        recipe: Recipe,
        pool: Pool,
        parts: Sequence[Part],
        view: Augmentation,
        key: tuple[int, ...],
        total: int,
    ) -> None:
        self.pool = pool
        self.parts = tuple(parts)
        self.view = view
        self.total = total
        self.size = recipe.batch_size
        self.key = (recipe.seed, *key)

    def __len__(self) -> int:
        return self.total

    def positions(self, j: int) -> np.ndarray:
        """Positions in the pool of the images of batch j."""
        m, k = divmod(j, len(self.parts))
        part = self.parts[k]
        own = images_of_part(part, self.size)
        drawn = [self._stream(part.own, m * own, own, (k, 0))]
        if part.output is not None:
            rest = self.size - own
            drawn.append(self._stream(part.others, m * rest, rest, (k, 1)))
        return np.concatenate(drawn)

    def _stream(
        self, images: np.ndarray, begin: int, count: int, key: tuple[int, ...]
    ) -> np.ndarray:
        """Images `begin` to `begin + count` of one permutation after another."""
        n = len(images)
        passes = range(begin // n, (begin + count - 1) // n + 1)
        orders = [np.random.default_rng([*self.key, *key, p]).permutation(n) for p in passes]
        return images[np.concatenate(orders)[begin % n :][:count]]

    def __getitem__(self, j: int) -> feed.Share | str:
        positions = self.positions(j).tolist()
        draws = Draws((*self.key, j), self.view.width).table(len(positions))
        images = []
        for position, numbers in zip(positions, draws, strict=True):
            try:
                pixels = torch.from_numpy(self.pool.read(position)).permute(2, 0, 1)
                images.append(self.view.cropped(pixels[None], numbers[None])[0])
            except UserError as error:  # raised in a worker it would arrive as a traceback
                return str(error)
        labels = torch.from_numpy(self.pool.labels[positions])
        return self.view.coloured(torch.stack(images), draws), labels


def images_of_part(part: Part, size: int) -> int:
    """Number of the part's own images in a batch: all, or half for a one-vs-rest part."""
    return size if part.output is None else max(size // 2, 1)
