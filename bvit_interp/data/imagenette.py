"""Imagenette, ten classes of ImageNet, from parquet or official folders.

Howard 2019, version 2. The official archives have 9,469 training and 3,925 validation images; the
validation images are the split test here. A label is the rank of the wnid in every copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bvit_interp.data.files import check_regular
from bvit_interp.data.folders import ImageFolderSamples, class_folders, subfolders
from bvit_interp.data.parquet import ParquetSamples, split_files
from bvit_interp.data.samples import Samples
from bvit_interp.errors import DataError, choices

WORDS = {  # wnid -> class name in some copies
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
WNIDS = tuple(WORDS)  # sorted
OFFICIAL = ("imagenette2", "imagenette2-320", "imagenette2-160")  # folders of the official archives
FILES = {"train": ("train",), "test": ("test", "validation", "val")}  # parquet files of a split
FOLDERS = {"train": "train", "test": "val"}


class ImagenetteParquet(ParquetSamples):
    """One split from parquet files, with wnids or words as class names.

    Parameters
    ----------
    root : the folder of the files.
    split : prefix of the file names.

    Raises
    ------
    DataError
        If the classes are not the ten of Imagenette, or one of them has no image.
    """

    official = True

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root, split)
        order = wnids_of(self.classes)
        if order is None:
            named = f"{len(self.classes)} classes, called {choices(self.classes, 3)}"
            ten = choices(f"{wnid} ({word})" for wnid, word in WORDS.items())
            raise DataError(f"{root}: {named}; imagenette has {ten}; try folder:{root}")
        self.labels = np.array([WNIDS.index(wnid) for wnid in order])[self.labels]
        self.classes = WNIDS
        _check_counts(f"{root}/{split}", self.labels)
        self.native_size = common_side(self.content(i) for i in range(len(self)))


class ImagenetteFolder(ImageFolderSamples):
    """One split of the official archives: a folder for each of the ten wnids, and no other.

    Parameters
    ----------
    root : the folder of the class folders, ``train`` or ``val``.

    Raises
    ------
    DataError
        If a class folder is missing or empty, or is not one of the ten.
    """

    official = True

    def __init__(self, root: Path) -> None:
        found = class_folders(root)
        if missing := [wnid for wnid in WNIDS if wnid not in found]:
            raise DataError(f"{root}: no folder {choices(missing)}; imagenette has one per wnid")
        if others := [name for name in found if name not in WORDS]:
            some = choices(others, 3)
            raise DataError(f"{root}: folders of no class of imagenette: {some}; try folder:{root}")
        super().__init__(root, WNIDS)
        _check_counts(str(root), [label for label, _ in self.files])
        self.native_size = common_side(self.path(i) for i in range(len(self)))


def open_imagenette(root: Path, split: str) -> Samples:
    """A split ("train" or "test") of Imagenette, from parquet files or class folders.

    `root` holds parquet files, or ``train`` and ``val``, or one of the folders in `OFFICIAL`.

    Raises
    ------
    DataError
        If root holds none of them; the message names what it should hold.
    """
    root = _inner(root)
    for name in FILES[split]:
        if split_files(root, name):
            return ImagenetteParquet(root, name)
    folder = root / FOLDERS[split]
    if folder.is_dir():
        return ImagenetteFolder(folder)
    files = [f"{name}{end}.parquet" for name in FILES[split][:2] for end in ("", "-*")]
    wanted = f"neither {choices(files)} nor {folder.name}/<wnid>/*.JPEG"
    raise DataError(f"imagenette: {root} has {wanted}")


def wnids_of(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """The wnid of each class name, or None if the names are not the ten of Imagenette, each once.

    A name is a wnid or its word, in any case and spacing; text after a comma is ignored, as in
    "tench, Tinca tinca".
    """
    known = {_letters(word): wnid for wnid, word in WORDS.items()} | {wnid: wnid for wnid in WNIDS}
    found = tuple(known.get(_letters(name), "") for name in names or ())
    return found if sorted(found) == list(WNIDS) else None


def is_imagenette(folder: Path) -> bool:
    """Whether a folder is one of the official archives, holds one, or has their layout."""
    if folder.name in OFFICIAL or any((folder / name).is_dir() for name in OFFICIAL):
        return True
    inner = [folder / name for name in FOLDERS.values() if (folder / name).is_dir()]
    return any(subfolders(split) == list(WNIDS) for split in inner)


def common_side(sources: Iterable[Path | bytes | None]) -> int | None:
    """Side in pixels if all images (files or bytes) are square and have one size, else None.

    Only headers are read, up to the first that differs (9,103 images in 0.3 s). An image that
    cannot be read is ignored here; reading it later raises an error.
    """
    side = None
    for source in sources:
        try:
            if isinstance(source, Path):
                check_regular(source)
            file = source if isinstance(source, Path) else BytesIO(source or b"")
            with Image.open(file) as image:
                width, height = image.size
        except (DataError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        if width != height or width != (side or width):
            return None
        side = width
    return side


def _inner(root: Path) -> Path:
    """The folder that holds the splits: root, or the only archive in it."""
    if any((root / name).is_dir() for name in FOLDERS.values()):
        return root
    found = [name for name in OFFICIAL if (root / name).is_dir()]
    if len(found) > 1:
        raise DataError(f"{root} holds {choices(found)}: name one, imagenette:{root / found[0]}")
    return root / found[0] if found else root


def _check_counts(where: str, labels: Sequence[int] | np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(WNIDS))
    if empty := [wnid for wnid, count in zip(WNIDS, counts, strict=True) if not count]:
        raise DataError(f"{where}: no image of {choices(empty)}; imagenette has ten classes")


def _letters(name: str) -> str:
    """Letters and digits before the first comma, in lower case."""
    return "".join(c for c in name.partition(",")[0].lower() if c.isalnum())
