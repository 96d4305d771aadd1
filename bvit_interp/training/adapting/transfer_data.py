"""Training images of a transfer, and the classes it is scored in."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError, choices
from bvit_interp.training.pruning.subsets import Pool


class TrainingImages:
    """The images of a `Pool`, as `Samples` that are the same in every epoch."""

    has_masks = False

    def __init__(self, pool: Pool) -> None:
        self.pool, self.classes, self.native_size = pool, pool.classes, pool.samples.native_size

    def __len__(self) -> int:
        return len(self.pool)

    def name(self, i: int) -> str:
        return self.pool.samples.name(int(self.pool.index[i]))

    def read(self, i: int) -> tuple[np.ndarray, int, None]:
        return self.pool.read(i), int(self.pool.labels[i]), None


def training_images(samples: Samples, limit: int | None) -> TrainingImages:
    """The training images, `limit` of them evenly spaced over the data set, or all.

    Raises
    ------
    UserError
        For a data set with one class, or with a class that has no image.
    """
    if len(samples.classes) < 2:
        raise UserError(
            f"the data set has one class ({choices(samples.classes)}): nothing to tell apart"
        )
    pool = Pool(samples, samples.classes, limit)
    counts = np.bincount(pool.labels, minlength=len(samples.classes))
    if empty := [name for name, n in zip(samples.classes, counts, strict=True) if not n]:
        hint = " (raise n-train)" if limit is not None else ""
        raise UserError(f"no training image of {len(empty)} classes: {choices(empty)}{hint}")
    return TrainingImages(pool)


def trained_class(test: Samples, classes: tuple[str, ...]) -> Int[Tensor, " test_classes"]:
    """For each class of the test images, its index in the trained classes, by name.

    Raises
    ------
    UserError
        For a class that is not trained.
    """
    if unknown := [name for name in test.classes if name not in classes]:
        raise UserError(
            f"the training images lack {len(unknown)} classes of the test set: {choices(unknown)}"
        )
    return torch.tensor([classes.index(name) for name in test.classes])
