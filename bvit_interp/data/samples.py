"""The protocol of a data set: classes, images, labels, masks.

Labels and masks are coded as in ImageNet-S (Gao et al. 2022, https://arxiv.org/abs/2106.03149). A
label is an index into `classes`, from 0. In a mask the pixels of that class have the id label + 1,
pixels to ignore 1000, and all others 0. A mask is stored as an RGB PNG with id = R + 256 G.

Pixels become 8-bit RGB by one rule for all sets. It is that of torchvision's and timm's loaders,
except for deep images:

- 16 bits per channel are scaled to 8; floats in 0..1 are scaled to 0..255. Floats beyond 0..1 and
  32-bit integers have no stated range and are refused.
- Alpha is dropped: the stored colour is kept, whatever its opacity.
- EXIF orientations are not applied, because masks fit the stored pixels. A line on stderr says so
  at the first image that has one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from bvit_interp.data.files import check_regular, escaped, say
from bvit_interp.errors import DataError, UserError, first_line

_ORIENTATION = 274  # EXIF tag
_UNREADABLE = (  # errors of PIL; they depend on the format and the damage
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@runtime_checkable
class Samples(Protocol):
    """A data set, read one image at a time.

    A set may have an attribute ``official = True``: its classes are those of a published set, in
    the order that models trained on that set use.
    """

    @property
    def classes(self) -> Sequence[str]:
        """Class names; a label is an index into them."""

    @property
    def native_size(self) -> int | None:
        """Side in pixels if all images are square and have one size, else None."""

    @property
    def has_masks(self) -> bool:
        """Whether `read` gives masks."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Name of image i, with "/" between folders."""

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Image ``(H, W, 3)`` uint8, label, and mask ``(H, W)`` int32 or None.

        Raises
        ------
        DataError
            If the image is corrupt or its mask does not fit; the message names the file.
        """


@dataclass(frozen=True)
class Subset:
    """Some images of a data set, as `Samples`: image i is image ``index[i]`` of `data`."""

    data: Samples
    index: Sequence[int]

    @property
    def classes(self) -> Sequence[str]:
        """The classes of the whole set, also those without an image here."""
        return self.data.classes

    @property
    def native_size(self) -> int | None:
        """The native size of the set."""
        return self.data.native_size

    @property
    def has_masks(self) -> bool:
        """Whether the set has masks."""
        return self.data.has_masks

    @property
    def official(self) -> bool:
        """Whether the classes are those of a published set, in its order."""
        return getattr(self.data, "official", False)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        """Name of image i in the set."""
        return self.data.name(self.index[i])

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Image, label and mask, as in the set."""
        return self.data.read(self.index[i])


def read_image(source: Path | bytes, name: str) -> np.ndarray:
    """Pixels ``(H, W, 3)`` uint8 of an image file or its bytes, in any colour mode.

    `name` is used in error messages.
    """
    try:
        with Image.open(_opened(source)) as image:
            return picture_pixels(image, name)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(name, "image", error) from error


def picture_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Pixels ``(H, W, 3)`` uint8 of an open picture; `name` is used in error messages."""
    try:
        if image.info.get("exif") and image.getexif().get(_ORIENTATION, 1) != 1:
            say("EXIF orientations are not applied: pixels are read as they are stored")
        return _rgb(image, name)
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(name, "image", error) from error


def read_mask(path: Path) -> np.ndarray:
    """Class ids ``(H, W)`` int32 of a mask in ImageNet-S coding."""
    try:
        with Image.open(_opened(path)) as image:
            if (image.format, image.mode) != ("PNG", "RGB"):
                raise DataError(
                    f"{path}: a mask is an RGB PNG, this is {image.format} in mode {image.mode}"
                )
            pixels = np.array(image).astype(np.int32)  # R + 256 G overflows in uint8
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(str(path), "mask", error) from error
    return pixels[..., 0] + 256 * pixels[..., 1]


def write_mask(ids: np.ndarray, path: Path) -> None:
    """Store class ids ``(H, W)`` as an RGB PNG in ImageNet-S coding."""
    pixels = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def evenly_spaced(length: int, limit: int | None) -> list[int]:
    """`limit` sorted indices, evenly spaced over 0..length - 1; all if the limit is None or larger.

    Most sets are sorted by class, so the first n images would have only a few classes.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    kept = length if limit is None else min(limit, length)
    return [i * length // kept for i in range(kept)]


def _opened(source: Path | bytes) -> Path | BytesIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    check_regular(source)
    return source


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """Pixels ``(H, W, 3)`` uint8; deep images have one channel (PIL reduces deep RGB to 8 bits)."""
    deep_integers = image.mode == "I" and image.format in ("PNG", "PPM")  # PIL's mode for 16 bits
    if image.mode.startswith("I;16") or deep_integers:
        grey = np.rint(np.array(image).astype(np.float64) / 257)
    elif image.mode == "F":
        grey = np.rint(np.array(image).astype(np.float64) * 255)
        if not (grey >= 0).all() or not (grey <= 255).all():
            raise DataError(
                f"{escaped(name)}: its pixels are floats beyond 0..1: save it with 8 or 16 bits"
            )
    elif image.mode.startswith("I"):
        raise DataError(
            f"{escaped(name)}: its pixels are 32-bit integers, whose range is not stated: save it"
            " with 8 or 16 bits"
        )
    else:
        return np.array(image.convert("RGB"))
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def _unreadable(name: str, what: str, error: BaseException) -> DataError:
    name = escaped(name)
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name}: no such file")
    reason = (
        "no image file" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
    )
    return DataError(f"{name}: the {what} cannot be read ({reason})")
