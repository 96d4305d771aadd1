"""Batches of an epoch, each a function of (seed, epoch, place): a killed run goes on where it was.

The order of epoch e is a permutation drawn for (seed, e), and an image is augmented for (seed, e, image, how often it
was seen in e): neither the number of processes, nor of workers, nor the batch at which a run resumes changes what the
model is shown. (Mixup draws its partners within a process's part of a batch.)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.samples import Samples, spread
from bvit_interp.errors import DataError, UserError
from bvit_interp.results import rank_and_world
from bvit_interp.training.augment import View, drawn_for, reseed
from bvit_interp.training.recipe import Recipe

_log = logging.getLogger(__name__)
Share = tuple[torch.Tensor, torch.Tensor]
"""This process's part of a batch: images ``(b, 3, H, W)`` float32 and labels ``(b,)`` int64."""


def training_samples(recipe: Recipe, samples: Samples, epoch: int) -> Samples:
    """What epoch `epoch` (from 0) draws from: the set itself, or fresh scenes of digits-s."""
    if not isinstance(samples, DigitScenes):
        return samples
    n = images_per_epoch(recipe, samples)
    return DigitScenes("train", length=n, start=epoch * n, hardness=recipe.hardness(epoch))


def images_per_epoch(recipe: Recipe, samples: Samples) -> int:
    """Images of an epoch, whole batches or not."""
    return recipe.images_per_epoch or len(samples)


def fingerprint(samples: Samples) -> str:
    """16 hex digits of the classes, the number of images and 32 of them: data of one name are not always the same."""
    digest = hashlib.sha256(repr((list(samples.classes), len(samples))).encode())
    for i in spread(len(samples), 32):
        try:
            image, label, _ = samples.read(i)
        except DataError:
            continue
        digest.update(image.tobytes() + bytes(str(label), "ascii"))
    return digest.hexdigest()[:16]


class Epoch(Dataset[Share | str]):
    """The batches of one epoch; the last incomplete one is left out.

    Parameters
    ----------
    recipe : batch size, images an epoch, seed, and whether an image that cannot be read is passed over.
    samples : what to draw from.
    view : the augmentation of one image.
    epoch : from 0.
    """

    def __init__(self, recipe: Recipe, samples: Samples, view: View, epoch: int) -> None:
        self.samples = training_samples(recipe, samples, epoch)
        self.view, self.seed, self.epoch, self.size = view, recipe.seed, epoch, recipe.batch_size
        self.steps = images_per_epoch(recipe, samples) // recipe.batch_size
        needed = self.steps * recipe.batch_size
        rng = np.random.default_rng([recipe.seed, epoch])
        passes = -(-needed // len(self.samples))
        self.order = np.concatenate([rng.permutation(len(self.samples)) for _ in range(passes)])[:needed]
        self.passes = np.arange(needed) // len(self.samples)  # a second view of an image is another one
        self.rank, self.world = rank_and_world()
        self.skip_corrupt = recipe.skip_corrupt

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Share | str:
        """Batch `step`, or what could not be read: an exception would come out of a worker as a traceback."""
        own = slice(step * self.size + self.rank, (step + 1) * self.size, self.world)
        images, labels = [], []
        with drawn_for(0):
            for i, seen in zip(self.order[own].tolist(), self.passes[own].tolist(), strict=True):
                try:
                    image, label = self._read(i)
                    reseed(self.seed, self.epoch, i, seen)
                    images.append(self.view(image))
                except UserError as error:
                    return str(error)
                labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    def _read(self, i: int) -> tuple[np.ndarray, int]:
        """Image i and its label; with `skip_corrupt` the next one that can be read."""
        for place in range(i, i + len(self.samples)):
            try:
                image, label, _ = self.samples.read(place % len(self.samples))
            except DataError as error:
                if not self.skip_corrupt:
                    raise
                _log.warning("left out: %s", error)
            else:
                return image, label
        raise DataError("no training image can be read")


def batches(epoch: Epoch, first: int, workers: int, pin: bool = False) -> Iterator[Share]:
    """Batches `first`, `first` + 1, ... of an epoch, prepared ahead by `workers` processes."""
    loader = DataLoader(
        epoch, batch_size=None, sampler=range(first, len(epoch)), num_workers=workers, pin_memory=pin,
        generator=torch.Generator(),
    )  # fmt: skip
    for share in loader:
        if isinstance(share, str):
            raise DataError(share)
        yield share
