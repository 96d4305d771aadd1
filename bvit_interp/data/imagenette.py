"""Imagenette, ten classes of ImageNet, from parquet or official folders.

Howard 2019, version 2 (officially 9,469 training and 3,925 validation images; the latter are the
split test). A label is the rank of the wnid, whatever order a copy has them in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bvit_interp.data.folders import ImageFolderSamples, class_folders, subfolders
from bvit_interp.data.parquet import ParquetSamples, split_files
from bvit_interp.data.samples import Samples
from bvit_interp.errors import DataError, choices

WORDS = {  # wnid -> the name that other copies use
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
    """One split from parquet files whose classes are named by wnid or by word.

    Parameters
    ----------
    root : the folder of the files.
    split : first part of the files' names.

    Raises
    ------
    DataError
        If the classes are not the ten, or one of them has no image.
    """

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
        self.native_size = common_side((row.as_py() or {}).get("bytes") for row in self._images)


class ImagenetteFolder(ImageFolderSamples):
    """One split of the official archives: a folder per wnid, all ten of them and no other.

    Parameters
    ----------
    root : the folder of the class folders, ``train`` or ``val``.

    Raises
    ------
    DataError
        If a class folder is missing, empty or none of the ten.
    """

    def __init__(self, root: Path) -> None:
        found = class_folders(root)
        if missing := [wnid for wnid in WNIDS if wnid not in found]:
            raise DataError(f"{root}: no folder {choices(missing)}; imagenette has ten, one a wnid")
        if others := [name for name in found if name not in WORDS]:
            some = choices(others, 3)
            raise DataError(f"{root}: folders of no class of imagenette: {some}; try folder:{root}")
        super().__init__(root, WNIDS)
        _check_counts(str(root), [label for label, _ in self.files])
        self.native_size = common_side(root / self.name(i) for i in range(len(self)))


def open_imagenette(root: Path, split: str) -> Samples:
    """A split ("train" or "test") of Imagenette in whichever form lies in root.

    root : a folder of parquet files, one with ``train`` and ``val``, or one with one of `OFFICIAL`.

    Raises
    ------
    DataError
        Naming the path and what should lie there.
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
    """The wnid of each class name, or None if the names are not Imagenette's ten, each once.

    A name is a wnid or its word, in any case and spacing; of "tench, Tinca tinca" the first counts.
    """
    told = {_letters(word): wnid for wnid, word in WORDS.items()} | {wnid: wnid for wnid in WNIDS}
    found = tuple(told.get(_letters(name), "") for name in names or ())
    return found if sorted(found) == list(WNIDS) else None


def is_imagenette(folder: Path) -> bool:
    """Whether a folder is one of the official archives, holds one, or is laid out as they are."""
    if folder.name in OFFICIAL or any((folder / name).is_dir() for name in OFFICIAL):
        return True
    inner = [folder / name for name in FOLDERS.values() if (folder / name).is_dir()]
    return any(subfolders(place) == list(WNIDS) for place in inner)


def common_side(sources: Iterable[Path | bytes | None]) -> int | None:
    """Side in pixels if all images, given as files or bytes, are square and of one size, else None.

    Only headers are read, up to the first that differs (all 9,103 of a squashed copy: 0.3 s). An
    image that cannot be read is passed over; it is refused when its turn comes.
    """
    side = None
    for source in sources:
        try:
            file = source if isinstance(source, Path) else BytesIO(source or b"")
            with Image.open(file) as image:
                width, height = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        if width != height or width != (side or width):
            return None
        side = width
    return side


def _inner(root: Path) -> Path:
    """The folder that has the splits: root, or the one archive that it holds."""
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
    """Letters and digits of the first of the names, in lower case."""
    return "".join(c for c in name.partition(",")[0].lower() if c.isalnum())
