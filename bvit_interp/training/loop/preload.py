"""All images of a data set, kept on a device."""

from __future__ import annotations

import hashlib
import os
from weakref import WeakValueDictionary

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from tqdm import tqdm

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.errors import DataError, UserError
from bvit_interp.results import rank_and_world
from bvit_interp.training.loop.augment import wrong_size
from bvit_interp.training.loop.epochs import loaded, read_image
from bvit_interp.training.loop.recipe import Recipe

HOST_BYTES = 4 * 2**30  # largest size of the images that are kept in the machine's memory
_GPU_SHARE = 0.4  # and the same for a GPU, as a share of its memory
_BLOCK = 256  # images that are read together
_GPU_READERS = 12


class ImagesOnDevice:
    """All images of a data set, without augmentation, and their labels, on one device."""

    def __init__(
        self, images: UInt8[Tensor, "images 3 height width"], labels: Int[Tensor, " images"]
    ) -> None:
        self.images, self.labels = images, labels


# several runs in one process share the images
_KEPT: WeakValueDictionary[tuple[str, str, bool], ImagesOnDevice] = WeakValueDictionary()


def images_on_device(
    samples: Samples,
    device: str,
    skip_corrupt: bool = False,
    workers: int = 0,
    required_size: tuple[int, int] | None = None,
) -> ImagesOnDevice | None:
    """The images on the device, or None if they differ in size or do not fit.

    It is also None for digits-s, which draws new scenes in each epoch.

    Parameters
    ----------
    skip_corrupt : use the next image in place of one that cannot be read.
    workers : processes that read the images; 0 reads them in this one.
    required_size : refuse images of another height and width.

    Raises
    ------
    DataError
        For an image that cannot be read, or of another size than `required_size`.
    """
    if isinstance(samples, DigitScenes):
        return None
    key = fingerprint(samples), str(device), skip_corrupt
    if (kept := _KEPT.get(key)) is not None:
        return kept
    shape = read_image(samples, 0, skip_corrupt)[0].shape
    if len(samples) * int(np.prod(shape)) > _room(device):
        return None
    images = torch.empty(len(samples), shape[2], *shape[:2], dtype=torch.uint8)
    labels = torch.empty(len(samples), dtype=torch.int64)
    silent = rank_and_world()[0] > 0 or len(samples) < 2000
    blocks = _ImageBlocks(samples, shape, skip_corrupt, required_size)
    with tqdm(
        total=len(samples), desc="read images", unit="image", disable=silent, leave=False
    ) as bar:
        begin = 0
        for block in loaded(blocks, 0, workers if len(blocks) > workers else 0, pin=False):
            if not block:
                return None  # an image of another size
            end = begin + len(block[1])
            images[begin:end], labels[begin:end] = block
            bar.update(end - begin)
            begin = end
    kept = _KEPT[key] = ImagesOnDevice(images.to(device), labels.to(device))
    return kept


class _ImageBlocks:
    """Blocks of images: pixels ``(b, 3, H, W)`` uint8 and labels; () if one differs in size."""

    def __init__(
        self,
        samples: Samples,
        shape: tuple[int, ...],
        skip_corrupt: bool,
        required_size: tuple[int, int] | None,
    ) -> None:
        self.samples, self.shape = samples, shape
        self.skip_corrupt, self.required_size = skip_corrupt, required_size

    def __len__(self) -> int:
        return -(-len(self.samples) // _BLOCK)

    def __getitem__(self, block: int) -> tuple[Tensor, ...] | str:
        pixels, labels = [], []
        for i in range(block * _BLOCK, min((block + 1) * _BLOCK, len(self.samples))):
            try:
                image, label, _ = read_image(self.samples, i, self.skip_corrupt)
            except UserError as error:  # a worker's exception would come with a traceback
                return str(error)
            if self.required_size is not None and image.shape[:2] != self.required_size:
                return f"{self.samples.name(i)}: {wrong_size(image.shape[:2], self.required_size)}"
            if image.shape != self.shape:
                return ()
            pixels.append(torch.from_numpy(image))
            labels.append(label)
        return torch.stack(pixels).permute(0, 3, 1, 2), torch.tensor(labels)


def reader_processes(recipe: Recipe, device: str) -> int:
    """Number of processes that read images once, before training.

    It is the recipe's number of workers. On a GPU, which waits for the images, it is at least
    twelve if the machine has as many cores.
    """
    if torch.device(device).type != "cuda":
        return recipe.workers
    return max(recipe.workers, min(_GPU_READERS, (os.cpu_count() or 1) - 1))


def fingerprint(samples: Samples) -> str:
    """16 hex digits of the classes, the number of images, and 32 of the images.

    Data sets with the same name are not always the same.
    """
    digest = hashlib.sha256(repr((list(samples.classes), len(samples))).encode())
    for i in evenly_spaced(len(samples), 32):
        try:
            image, label, _ = samples.read(i)
        except DataError:
            continue
        digest.update(image.tobytes() + bytes(str(label), "ascii"))
    return digest.hexdigest()[:16]


def _room(device: str) -> float:
    """Bytes that images may take on the device."""
    if torch.device(device).type == "cuda":
        return _GPU_SHARE * torch.cuda.get_device_properties(device).total_memory
    return HOST_BYTES
