"""CIFAR-10 and CIFAR-100 from parquet or torchvision's own files.

Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from torchvision import datasets

from bvit_interp.data.files import check_regular
from bvit_interp.data.parquet import ParquetSamples, split_files
from bvit_interp.data.samples import Samples
from bvit_interp.errors import DataError, first_line

Name = Literal["cifar10", "cifar100"]
SIZE = 32  # pixels
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS: dict[Name, int] = {"cifar10": 10, "cifar100": 100}  # classes
BINARIES: dict[Name, str] = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


class CifarBinaries:
    """CIFAR as torchvision stores it, in ``root/cifar-10-batches-py`` or
    ``root/cifar-100-python``."""

    native_size: int | None = SIZE
    has_masks = False
    official = True

    def __init__(self, name: Name, root: Path, split: str, download: bool = False) -> None:
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        folder = root / BINARIES[name]
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.exists() and not file.is_dir():
                check_regular(file)
        try:
            source = kind(str(root), train=split == "train", download=download)
        except (OSError, RuntimeError) as error:  # a failed download or a wrong checksum
            state = "could not be downloaded" if download else "incomplete or corrupt"
            raise DataError(f"{root / BINARIES[name]}: {state} ({first_line(error)})") from error
        self.root, self.split = root, split
        self.classes: tuple[str, ...] = tuple(source.classes)
        self.pixels: np.ndarray = source.data
        self.labels: list[int] = source.targets

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"{self.root.name}/{self.split}/{i:06d}"

    def read(self, i: int) -> tuple[np.ndarray, int, None]:
        return self.pixels[i], self.labels[i], None


def open_cifar(name: Name, root: Path, split: str, download: bool = False) -> Samples:
    """CIFAR from the parquet or binary files in root; `download` fetches them if there are none."""
    if split_files(root, split):
        official = CIFAR10 if name == "cifar10" else None
        samples = ParquetSamples(root, split, classes=official, native_size=SIZE)
        if len(samples.classes) != COUNTS[name]:
            raise DataError(
                f"{root}: {len(samples.classes)} classes, {name} has {COUNTS[name]}; try"
                f" folder:{root}"
            )
        samples.official = official is None or samples.classes == official
        return samples
    if root.name == BINARIES[name]:
        root = root.parent
    if download or (root / BINARIES[name]).is_dir():
        return CifarBinaries(name, root, split, download)
    raise DataError(
        f"{name}: {root} has neither {split}.parquet, {split}-*.parquet nor {BINARIES[name]}/;"
        " --download fetches it"
    )
