"""The order of an epoch's images, and its batches.

The order of epoch e is a permutation drawn for (seed, e). The augmentation of an image is drawn for
(seed, e, image, number of times it was shown in e). What the model is shown does not depend on the
number of processes or workers, or on the batch at which a run resumes. Only Mixup and CutMix depend
on the number of processes: they mix images within a process's share of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.samples import Samples
from bvit_interp.errors import DataError, UserError
from bvit_interp.results import rank_and_world
from bvit_interp.training.loop.draws import Draws
from bvit_interp.training.loop.recipe import Recipe

_log = logging.getLogger(__name__)
Share = tuple[Tensor, Tensor]
"""This process's share of a batch: images ``(b, 3, H, W)`` float32, and labels ``(b,)`` int64 or
soft targets ``(b, C)``."""
Prepare = Callable[[np.ndarray, np.ndarray], Tensor]
"""An image ``(H, W, 3)`` uint8 and its row of uniform numbers -> a tensor that can be stacked."""
_IMAGES = 1  # key of the random numbers of images; the order of an epoch has none
_AT_ONCE_VALUES = 2**26  # largest number of pixel values that a GPU augments at once
_AT_ONCE_IMAGES = 4096


class Epoch(Dataset[tuple[Tensor, Tensor, Tensor] | str]):
    """The batches of one epoch; a last incomplete batch is left out.

    Parameters
    ----------
    recipe : batch size, images per epoch, seed, and whether to skip images that cannot be read.
    samples : the data set.
    prepare : applied to each image and the row of numbers drawn for it.
    number : number of the epoch, from 0.
    width : uniform numbers drawn per image.

    Attributes
    ----------
    order : positions in the data set, in the order of the epoch, ``(images,)``.
    draws : the uniform numbers of all images; see `rows`.
    """

    def __init__(
        self, recipe: Recipe, samples: Samples, prepare: Prepare, number: int, width: int = 0
    ) -> None:
        self.samples = training_samples(recipe, samples, number)
        self.prepare, self.size = prepare, recipe.batch_size
        self.steps = images_per_epoch(recipe, samples) // recipe.batch_size
        needed = self.steps * recipe.batch_size
        rng = np.random.default_rng([recipe.seed, number])
        passes = -(-needed // len(self.samples))
        permutations = [rng.permutation(len(self.samples)) for _ in range(passes)]
        self.order = np.concatenate(permutations)[:needed]
        self.passes = np.arange(needed) // len(self.samples)  # times an image was shown before
        self.draws = Draws([recipe.seed, number, _IMAGES], width)
        self.rank, self.world = rank_and_world()
        self.skip_corrupt = recipe.skip_corrupt

    def __len__(self) -> int:
        return self.steps

    def positions(self, step: int) -> np.ndarray:
        """Positions in `order` of this process's share of batch `step`."""
        return np.arange(step * self.size + self.rank, (step + 1) * self.size, self.world)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows of `draws` of the images at these positions of `order`."""
        return self.passes[positions] * len(self.samples) + self.order[positions]

    def group_ends(self, device: torch.device, size: tuple[int, int]) -> Iterator[int]:
        """Ends of the groups of steps that are augmented at once.

        They do not depend on where a run resumes.
        """
        share = self.size // self.world
        images = 1
        if device.type == "cuda":
            images = min(_AT_ONCE_VALUES // (3 * size[0] * size[1]), _AT_ONCE_IMAGES)
        steps = max(images // share, 1)
        yield from range(steps, self.steps, steps)
        yield self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor] | str:
        """Batch `step`: images, labels and numbers; or why an image cannot be read.

        The reason is returned rather than raised, because an exception of a worker process would be
        wrapped in a traceback.
        """
        positions = self.positions(step)
        images, labels, draws = [], [], []
        rows = self.rows(positions)
        for i, row in zip(self.order[positions].tolist(), rows.tolist(), strict=True):
            numbers = self.draws.row(row)
            try:
                image, label, _ = read_image(self.samples, i, self.skip_corrupt)
                images.append(self.prepare(image, numbers))
            except UserError as error:
                return str(error)
            labels.append(label)
            draws.append(numbers)
        return torch.stack(images), torch.tensor(labels), torch.from_numpy(np.stack(draws))


def training_samples(recipe: Recipe, samples: Samples, epoch: int) -> Samples:
    """The images of epoch `epoch` (from 0): the data set, or new scenes of digits-s."""
    if not isinstance(samples, DigitScenes):
        return samples
    n = images_per_epoch(recipe, samples)
    return DigitScenes("train", length=n, start=epoch * n, hardness=recipe.hardness(epoch))


def images_per_epoch(recipe: Recipe, samples: Samples) -> int:
    """Number of images per epoch, those of an incomplete last batch included."""
    return recipe.images_per_epoch or len(samples)


def batches(epoch: Epoch, first: int, workers: int, pin: bool = False) -> Iterator[Share]:
    """Images and labels of batch `first` and later ones, prepared by `workers` processes."""
    for images, labels, *_ in loaded(epoch, first, workers, pin):
        yield images, labels


class Blocks(Protocol):
    """What `loaded` reads: tensors by number, or the reason why an image cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Tensor, ...] | str: ...


def loaded(blocks: Blocks, first: int, workers: int, pin: bool) -> Iterator[tuple[Tensor, ...]]:
    """Items `first`, `first` + 1, ... of a data set, prepared by `workers` processes.

    Raises
    ------
    DataError
        For an image that cannot be read.
    """
    loader: DataLoader = DataLoader(
        blocks,  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(first, len(blocks)),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, str):
            raise DataError(item)
        yield item


def read_image(samples: Samples, i: int, skip_corrupt: bool) -> tuple[np.ndarray, int, object]:
    """Image i and its label; with `skip_corrupt`, the next one that can be read.

    Raises
    ------
    DataError
        If image i cannot be read; with `skip_corrupt`, if no image can.
    """
    if not skip_corrupt:
        return samples.read(i)
    for position in range(i, i + len(samples)):
        try:
            return samples.read(position % len(samples))
        except DataError as error:
            # str(): a log record that holds the error would keep the images of its traceback
            _log.warning("left out: %s", str(error))
    raise DataError("no training image can be read")
