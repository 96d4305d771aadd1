"""Images in a folder per class, with or without masks beside them.

`ImageFolderSamples` reads the layout of torchvision's `ImageFolder`, which is also that of ImageNet
(a folder per wnid). `ImageNetS` adds masks (https://github.com/LUSSeg/ImageNet-S) in a second tree
with the same names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bvit_interp.data.samples import read_image, read_mask
from bvit_interp.errors import DataError, choices
from bvit_interp.vocabulary import IGNORE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MASKS = "-segmentation"  # the mask tree is called <split>-segmentation
CATEGORIES = "categories.txt"


class ImageFolderSamples:
    """The images ``root/<class>/*``, sorted by class and file name.

    Parameters
    ----------
    root : the folder of class folders.
    classes : class names in the order of the labels; by default the sorted folder names. A class
        may have no folder, but every folder must be a class.
    """

    native_size: int | None = None
    has_masks = False
    official: bool = False

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None) -> None:
        self.root = Path(root)
        folders = class_folders(self.root)
        self.classes: tuple[str, ...] = tuple(folders if classes is None else classes)
        labels = {name: label for label, name in enumerate(self.classes)}
        self.files = [  # names, not paths: ImageNet's training set has 1.3 million
            (labels[folder], file) for folder in folders for file in image_files(self.root / folder)
        ]
        if not self.files:
            raise DataError(
                f"{self.root}: no images ({', '.join(SUFFIXES)}) in {len(folders)} class folders"
            )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        label, file = self.files[i]
        return f"{self.classes[label]}/{file}"

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray | None]:
        path = self.root / self.name(i)
        return read_image(path, str(path)), self.files[i][0], None


class ImageNetS(ImageFolderSamples):
    """Images in ``root/<split>/<class>/`` with masks of the same names in
    ``root/<split>-segmentation/``.

    The id of a class is its line number (from 1) in ``root/categories.txt`` or in
    ``ImageNetS_categories_im*.txt`` in root or ``root/data/categories``. Without such a file it is
    its rank among the sorted folder names.
    """

    has_masks = True

    def __init__(self, root: str | Path, split: str = "validation") -> None:
        root = Path(root)
        folders = class_folders(root / split)
        file = _categories_file(root, folders)
        classes = folders if file is None else _listed(file)
        if unknown := sorted(set(folders) - set(classes)):
            raise DataError(f"{root / split}: class folders not in {file}: {choices(unknown, 3)}")
        super().__init__(root / split, classes)
        self.mask_root = root / f"{split}{MASKS}"
        self._check_pairs()

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray]:
        image, label, _ = super().read(i)
        path = self.mask_root / Path(self.name(i)).with_suffix(".png")
        mask = read_mask(path)
        if mask.shape != image.shape[:2]:
            sizes = [f"{width} x {height}" for height, width in (mask.shape, image.shape[:2])]
            raise DataError(f"{path}: the mask is {sizes[0]} pixels, its image {sizes[1]}")
        highest = int(mask[mask != IGNORE].max(initial=0))
        if highest > len(self.classes):
            raise DataError(
                f"{path}: class id {highest}, but there are {len(self.classes)} classes:"
                f" put the set's {CATEGORIES} into {self.root.parent}"
            )
        return image, label, mask

    def _check_pairs(self) -> None:
        if not self.mask_root.is_dir():
            raise DataError(f"no folder {self.mask_root} with the masks of {self.root}")
        images = {Path(self.name(i)).with_suffix("").as_posix() for i in range(len(self))}
        folders = subfolders(self.mask_root)
        files = [(name, file) for name in folders for file in image_files(self.mask_root / name)]
        masks = {f"{folder}/{Path(file).stem}" for folder, file in files if file.endswith(".png")}
        for alone, kind, folder in (
            (images - masks, "images without a mask", self.mask_root),
            (masks - images, "masks without an image", self.root),
        ):
            if alone:
                raise DataError(f"{len(alone)} {kind} in {folder}: {choices(sorted(alone), 3)}")


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders in root; raises a `DataError` if there are none."""
    if not root.is_dir():
        raise DataError(f"no folder {root}")
    if folders := subfolders(root):
        return folders
    stray = " (put its images into one folder per class)" if image_files(root) else ""
    raise DataError(f"{root}: no class folders{stray}")


def subfolders(root: Path) -> list[str]:
    """Sorted names of the folders in root that are not hidden."""
    with os.scandir(root) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def image_files(folder: Path) -> list[str]:
    """Sorted names of the files in a folder with the suffix of an image."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _listed(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _categories_file(root: Path, folders: list[str]) -> Path | None:
    found = [root / CATEGORIES] if (root / CATEGORIES).is_file() else []
    for folder in (root, root / "data" / "categories"):
        found += sorted(folder.glob("ImageNetS_categories_im*.txt"))
    if len(found) > 1:  # the official repository has the lists of all three subsets
        fitting = [file for file in found if sorted(_listed(file)) == folders]
        if not fitting:
            names = choices(file.name for file in found)
            raise DataError(
                f"{root}: none of {names} lists just the class folders there: keep the right one"
            )
        return fitting[0]
    return found[0] if found else None
