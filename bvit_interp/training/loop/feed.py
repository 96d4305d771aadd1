"""Augmented training batches on the device that trains.

If the images all have one size and fit, they are kept on the device as uint8 and augmented there,
several steps at once on a GPU (`preload`). Otherwise, worker processes read and crop them, and the
device does the rest (`epochs`). Both give the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.data.samples import Samples
from bvit_interp.training.loop.augment import Augmentation
from bvit_interp.training.loop.draws import to_device
from bvit_interp.training.loop.epochs import (
    Epoch,
    Share,
    batches,
    images_per_epoch,
    loaded,
    training_samples,
)
from bvit_interp.training.loop.mixing import Mixing
from bvit_interp.training.loop.preload import (
    ImagesOnDevice,
    fingerprint,
    images_on_device,
    reader_processes,
)
from bvit_interp.training.loop.recipe import Recipe

__all__ = [
    "Epoch",
    "Feed",
    "Share",
    "batches",
    "fingerprint",
    "images_per_epoch",
    "training_samples",
]


class Feed:
    """A recipe's training images, augmented and mixed on the device that trains.

    Parameters
    ----------
    recipe : batch size, images per epoch, seed and augmentation.
    samples : the data set; digits-s draws new scenes in each epoch.
    model : its input size, normalisation and number of classes are used.
    device : device of this process.
    """

    def __init__(
        self, recipe: Recipe, samples: Samples, model: VisionTransformer, device: str
    ) -> None:
        self.recipe, self.samples, self.device = recipe, samples, torch.device(device)
        self.augmentation = Augmentation(recipe, model)
        self.mixing = Mixing(recipe, model.num_classes)
        self.on_device: ImagesOnDevice | None = None
        shown = recipe.epochs * images_per_epoch(recipe, samples)
        if shown >= len(samples):  # else reading all images would take longer than the run
            resizes = recipe.crop == "random-resized"
            self.on_device = images_on_device(
                samples,
                device,
                recipe.skip_corrupt,
                reader_processes(recipe, device),
                required_size=None if resizes else self.augmentation.size,
            )

    def epoch(self, number: int, first: int = 0) -> Iterator[Share]:
        """This process's share of the batches `first`, `first` + 1, ... of an epoch, on the device.

        Parameters
        ----------
        number : number of the epoch, from 0.
        """
        epoch = Epoch(self.recipe, self.samples, self._cropped, number, self.augmentation.width)
        if self.on_device is None:
            groups = self._read(epoch, first)
        else:
            groups = self._taken(self.on_device, epoch, first)
        share = epoch.size // epoch.world
        for images, labels, draws in groups:
            mixed, targets = self.mixing(
                images, labels, self.augmentation.mixing_draws(draws), share
            )
            yield from zip(mixed.split(share), targets.split(share), strict=True)

    def _taken(
        self, kept: ImagesOnDevice, epoch: Epoch, first: int
    ) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """Images of one or several steps, taken from those on the device, and their numbers."""
        table = epoch.draws.table(int(epoch.passes[-1] + 1) * len(epoch.samples))
        step = first
        for end in epoch.group_ends(self.device, self.augmentation.size):
            if end <= first:
                continue
            positions = np.concatenate([epoch.positions(j) for j in range(step, end)])
            draws = table[epoch.rows(positions)]
            index = to_device(epoch.order[positions], self.device)
            yield self.augmentation(kept.images[index], draws), kept.labels[index], draws
            step = end

    def _read(self, epoch: Epoch, first: int) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        """Images of one step after another, read and cropped by the workers."""
        pin = self.device.type == "cuda"
        for images, labels, draws in loaded(epoch, first, self.recipe.workers, pin):
            numbers = draws.numpy()
            on_device = images.to(self.device, non_blocking=True)
            coloured = self.augmentation.coloured(on_device, numbers)
            yield coloured, labels.to(self.device, non_blocking=True), numbers

    def _cropped(self, image: np.ndarray, draws: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        return self.augmentation.cropped(pixels[None], draws[None])[0]
