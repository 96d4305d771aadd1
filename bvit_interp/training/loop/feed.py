"""Batches of an epoch, each a function of (seed, epoch, place): a killed run goes on where it was.

The order of epoch e is a permutation drawn for (seed, e), and an image is augmented for (seed, e,
image, how often it was seen in e): neither the number of processes, nor of workers, nor the batch
at which a run resumes changes what the model is shown. (Mixup takes its partners within a process's
part of a batch.)

Where the images are all of one size and fit, they lie on the device as uint8 and everything is
drawn there, many steps at once (`Resident`). Else workers read and crop them, and the device does
the rest (`Epoch`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.samples import Samples, spread
from bvit_interp.errors import DataError, UserError
from bvit_interp.results import rank_and_world
from bvit_interp.training.loop.augment import Augmentation, Mixing, other_size
from bvit_interp.training.loop.draws import Draws, sent
from bvit_interp.training.loop.recipe import Recipe

_log = logging.getLogger(__name__)
Share = tuple[Tensor, Tensor]
"""This process's part of a batch: images ``(b, 3, H, W)`` float32, and labels ``(b,)`` int64 or
soft targets."""
View = Callable[[np.ndarray, np.ndarray], Tensor]
"""An image ``(H, W, 3)`` uint8 and its row of uniform numbers -> what a batch is stacked of."""
_DRAW = 1  # of what is drawn for (seed, epoch): beside the order, what images draw
_HOST_BYTES = 4 * 2**30  # images kept in a machine's memory at most
_GPU_SHARE = 0.4  # of a GPU's memory
_AT_ONCE = (
    2**26
)  # values of images that a GPU augments at once: 4,096 of 32 px at most, one batch at least
_MOST_AT_ONCE = 4096


class Feed:
    """A recipe's training images, augmented and mixed on the device that trains.

    Parameters
    ----------
    recipe : batch size, images an epoch, seed, augmentation.
    samples : the data set; fresh scenes are drawn of digits-s.
    model : for its input size, normalisation and classes.
    device : of this process.
    """

    def __init__(
        self, recipe: Recipe, samples: Samples, model: torch.nn.Module, device: str
    ) -> None:
        self.recipe, self.samples, self.device = recipe, samples, torch.device(device)
        self.augmentation = Augmentation(recipe, model)  # type: ignore[arg-type]
        self.mixing = Mixing(recipe, int(model.num_classes))  # type: ignore[arg-type]
        shown = recipe.epochs * images_per_epoch(recipe, samples)
        few = shown < len(samples)  # reading all of them would take longer than the run
        self.resident: Resident | None = None
        if not few:
            only = None if recipe.crop == "random-resized" else self.augmentation.size
            self.resident = resident(
                samples, device, recipe.skip_corrupt, readers(recipe, device), only
            )

    def epoch(self, number: int, first: int = 0) -> Iterator[Share]:
        """This process's share of batches `first`, `first` + 1, ... of epoch `number` (from 0), on
        the device."""
        epoch = Epoch(self.recipe, self.samples, self._cropped, number, self.augmentation.width)
        shares = (
            self._streamed(epoch, first) if self.resident is None else self._resident(epoch, first)
        )
        for images, labels, draws in shares:
            yield from self._mixed(images, labels, draws, epoch)

    def _mixed(
        self, images: Tensor, labels: Tensor, draws: np.ndarray, epoch: Epoch
    ) -> Iterator[Share]:
        share = epoch.size // epoch.world
        mixed, targets = self.mixing(images, labels, self.augmentation.of_mixing(draws), share)
        yield from zip(mixed.split(share), targets.split(share), strict=True)

    def _resident(self, epoch: Epoch, first: int) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        assert self.resident is not None
        table = epoch.draws.table(int(epoch.passes[-1] + 1) * len(epoch.samples))
        step = first
        for end in epoch.groups(self.device, self.augmentation.size):
            if end <= first:
                continue
            places = np.concatenate([epoch.places(j) for j in range(step, end)])
            ids, draws = epoch.order[places], table[epoch.rows(places)]
            index = sent(ids, self.device)
            images = self.augmentation(self.resident.images[index], draws)
            yield images, self.resident.labels[index], draws
            step = end

    def _streamed(self, epoch: Epoch, first: int) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        for images, labels, draws in _loaded(
            epoch, first, self.recipe.workers, pin=self.device.type == "cuda"
        ):
            on_device = images.to(self.device, non_blocking=True)
            numbers = draws.numpy()
            coloured = self.augmentation.coloured(on_device, numbers)
            yield coloured, labels.to(self.device, non_blocking=True), numbers

    def _cropped(self, image: np.ndarray, draws: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        return self.augmentation.cropped(pixels[None], draws[None])[0]


class Resident:
    """All images of a data set on a device.

    Parameters
    ----------
    images : ``(N, 3, H, W)`` uint8.
    labels : ``(N,)`` int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels


_RESIDENT: WeakValueDictionary[tuple[str, str, bool], Resident] = (
    WeakValueDictionary()
)  # runs side by side share one


def resident(
    samples: Samples,
    device: str,
    skip_corrupt: bool = False,
    workers: int = 0,
    only: tuple[int, int] | None = None,
) -> Resident | None:
    """The images on the device, or None where they differ in size or do not fit; digits-s draws
    fresh ones.

    They are read once, by `workers` processes or in this one.

    Raises
    ------
    DataError
        For an image that cannot be read; with `skip_corrupt` the next one takes its place. For one
        of another height and width than `only`.
    """
    if isinstance(samples, DigitScenes):
        return None
    key = fingerprint(samples), str(device), skip_corrupt
    if (found := _RESIDENT.get(key)) is not None:
        return found
    shape = (_readable(samples, 0) if skip_corrupt else samples.read(0))[0].shape
    if len(samples) * int(np.prod(shape)) > _room(device):
        return None
    images = torch.empty(len(samples), shape[2], *shape[:2], dtype=torch.uint8)
    labels = torch.empty(len(samples), dtype=torch.int64)
    silent = rank_and_world()[0] > 0 or len(samples) < 2000
    blocks = _Blocks(samples, shape, skip_corrupt, only)
    with tqdm(
        total=len(samples), desc="read images", unit="image", disable=silent, leave=False
    ) as bar:
        begin = 0
        for part in _loaded(blocks, 0, workers if len(blocks) > workers else 0, pin=False):
            if not part:
                return None  # an image of another size
            end = begin + len(part[1])
            images[begin:end], labels[begin:end] = part
            bar.update(end - begin)
            begin = end
    kept = Resident(images.to(device), labels.to(device))
    _RESIDENT[key] = kept
    return kept


class _Blocks(Dataset[tuple[Tensor, ...] | str]):
    """The images of a set in blocks, as they are: pixels ``(b, 3, H, W)`` uint8 and labels; empty
    where one differs in size."""

    def __init__(
        self,
        samples: Samples,
        shape: tuple[int, ...],
        skip_corrupt: bool,
        only: tuple[int, int] | None = None,
        size: int = 256,
    ) -> None:
        self.samples, self.shape, self.skip_corrupt, self.only, self.size = (
            samples,
            shape,
            skip_corrupt,
            only,
            size,
        )

    def __len__(self) -> int:
        return -(-len(self.samples) // self.size)

    def __getitem__(self, block: int) -> tuple[Tensor, ...] | str:
        pixels, labels = [], []
        for i in range(block * self.size, min((block + 1) * self.size, len(self.samples))):
            try:
                image, label, _ = (
                    _readable(self.samples, i) if self.skip_corrupt else self.samples.read(i)
                )
            except UserError as error:  # out of a worker it would come as a traceback
                return str(error)
            if self.only is not None and image.shape[:2] != self.only:
                return f"{self.samples.name(i)}: {other_size(image.shape[:2], self.only)}"
            if image.shape != self.shape:
                return ()
            pixels.append(torch.from_numpy(image))
            labels.append(label)
        return torch.stack(pixels).permute(0, 3, 1, 2), torch.tensor(labels)


def readers(recipe: Recipe, device: str) -> int:
    """Processes that read what is read once: the recipe's workers; a GPU waits for it, so there at
    least twelve."""
    if torch.device(device).type != "cuda":
        return recipe.workers
    return max(recipe.workers, min(12, (os.cpu_count() or 1) - 1))


def _room(device: str) -> float:
    if torch.device(device).type == "cuda":
        return _GPU_SHARE * torch.cuda.get_device_properties(device).total_memory
    return _HOST_BYTES


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
    """16 hex digits of the classes, the number of images and 32 of them: data of one name are not
    always the same."""
    digest = hashlib.sha256(repr((list(samples.classes), len(samples))).encode())
    for i in spread(len(samples), 32):
        try:
            image, label, _ = samples.read(i)
        except DataError:
            continue
        digest.update(image.tobytes() + bytes(str(label), "ascii"))
    return digest.hexdigest()[:16]


class Epoch(Dataset[tuple[Tensor, Tensor, Tensor] | str]):
    """The batches of one epoch, read one image at a time; the last incomplete one is left out.

    Parameters
    ----------
    recipe : batch size, images an epoch, seed, and whether an image that cannot be read is passed
        over.
    samples : what to draw from.
    view : what is made of an image with the row of numbers drawn for it.
    epoch : from 0.
    width : uniform numbers drawn for an image.
    """

    def __init__(
        self, recipe: Recipe, samples: Samples, view: View, epoch: int, width: int = 0
    ) -> None:
        self.samples = training_samples(recipe, samples, epoch)
        self.view, self.size = view, recipe.batch_size
        self.steps = images_per_epoch(recipe, samples) // recipe.batch_size
        needed = self.steps * recipe.batch_size
        rng = np.random.default_rng([recipe.seed, epoch])
        passes = -(-needed // len(self.samples))
        self.order = np.concatenate([rng.permutation(len(self.samples)) for _ in range(passes)])[
            :needed
        ]
        self.passes = np.arange(needed) // len(
            self.samples
        )  # a second view of an image is another one
        self.draws = Draws([recipe.seed, epoch, _DRAW], width)
        self.rank, self.world = rank_and_world()
        self.skip_corrupt = recipe.skip_corrupt

    def __len__(self) -> int:
        return self.steps

    def places(self, step: int) -> np.ndarray:
        """Places in `order` of this process's share of batch `step`."""
        return np.arange(step * self.size + self.rank, (step + 1) * self.size, self.world)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Rows of `draws` at those places of `order`."""
        return self.passes[places] * len(self.samples) + self.order[places]

    def groups(self, device: torch.device, size: tuple[int, int]) -> Iterator[int]:
        """Ends of the groups of steps that are augmented at once; they do not depend on where a run
        resumes."""
        share = self.size // self.world
        images = (
            min(_AT_ONCE // (3 * size[0] * size[1]), _MOST_AT_ONCE) if device.type == "cuda" else 1
        )
        per = max(images // share, 1)
        yield from range(per, self.steps, per)
        yield self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor] | str:
        """Batch `step` and its numbers, or what could not be read: an exception would come out of a
        worker as a traceback."""
        places = self.places(step)
        images, labels, draws = [], [], []
        for i, row in zip(self.order[places].tolist(), self.rows(places).tolist(), strict=True):
            numbers = self.draws.row(row)
            try:
                image, label = self._read(i)
                images.append(self.view(image, numbers))
            except UserError as error:
                return str(error)
            labels.append(label)
            draws.append(numbers)
        return torch.stack(images), torch.tensor(labels), torch.from_numpy(np.stack(draws))

    def _read(self, i: int) -> tuple[np.ndarray, int]:
        """Image i and its label; with `skip_corrupt` the next one that can be read."""
        return (_readable(self.samples, i) if self.skip_corrupt else self.samples.read(i))[:2]


def _readable(samples: Samples, i: int) -> tuple[np.ndarray, int, object]:
    """Image i, or the next one that can be read, with its label."""
    for place in range(i, i + len(samples)):
        try:
            return samples.read(place % len(samples))
        except DataError as error:
            _log.warning(
                "left out: %s", str(error)
            )  # a record of the error itself would keep all it has seen
    raise DataError("no training image can be read")


def _loaded(epoch: Dataset, first: int, workers: int, pin: bool) -> Iterator[tuple[Tensor, ...]]:
    loader = DataLoader(
        epoch,
        batch_size=None,
        sampler=range(first, len(epoch)),
        num_workers=workers,
        pin_memory=pin,  # type: ignore[arg-type]
        generator=torch.Generator(),
    )
    for share in loader:
        if isinstance(share, str):
            raise DataError(share)
        yield share


def batches(epoch: Dataset, first: int, workers: int, pin: bool = False) -> Iterator[Share]:
    """Images and labels of batches `first`, `first` + 1, ... of an epoch, prepared ahead by
    `workers` processes."""
    for images, labels, *_ in _loaded(epoch, first, workers, pin):
        yield images, labels
