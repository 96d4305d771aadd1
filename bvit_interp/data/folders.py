"""Images in a folder per class, with or without masks beside them.

`ImageFolderSamples` reads the layout of torchvision's `ImageFolder`, which is also that of ImageNet
(a folder per wnid). `ImageNetS` adds masks (https://github.com/LUSSeg/ImageNet-S) in a second tree
with the same names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bvit_interp.data.files import escaped, read_lines
from bvit_interp.data.inventory import Notes, count, unique
from bvit_interp.data.samples import read_image, read_mask
from bvit_interp.errors import DataError, choices
from bvit_interp.vocabulary import IGNORE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MASKS = "-segmentation"  # the mask tree is called <split>-segmentation
CATEGORIES = "categories.txt"
ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet


class ImageFolderSamples:
    """The images ``root/<class>/*``, sorted by class and file name.

    As in torchvision's `ImageFolder`, images in subfolders of a class folder belong to that class.
    Hidden files, files with other suffixes and anything that is not a regular file are left out;
    `notes` says how many.

    Parameters
    ----------
    root : the folder of class folders.
    classes : class names in the order of the labels; by default the sorted names of the folders
        with images. A class may have no folder, but every folder must be a class.

    Raises
    ------
    DataError
        If there are no images, or if they lie only in subfolders of the class folders, so that
        another folder must be meant.
    """

    native_size: int | None = None
    has_masks = False
    official: bool = False

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None) -> None:
        self.root, self.notes = Path(root), Notes()
        listings = {name: listing(self.root / name) for name in class_folders(self.root)}
        self._check_depth(listings)
        folders = [name for name, found in listings.items() if found.images or classes is not None]
        self.classes: tuple[str, ...] = tuple(
            [escaped(name) for name in folders] if classes is None else classes
        )
        labels = {name: label for label, name in enumerate(self.classes)}
        self._folders = {labels[escaped(name)]: name for name in folders}
        self.files = [  # names, not paths: ImageNet's training set has 1.3 million
            (label, file) for label, name in self._folders.items() for file in listings[name].images
        ]
        if not self.files:
            raise DataError(
                f"{self.root}: no images ({', '.join(SUFFIXES)}) in {len(listings)} class folders"
            )
        self._note(listings, [name for name in listings if not listings[name].images])

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        label, file = self.files[i]
        return f"{self.classes[label]}/{escaped(file)}"

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self.root / self._place(i)

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray | None]:
        path = self.path(i)
        return read_image(path, str(path)), self.files[i][0], None

    def _place(self, i: int) -> str:
        """The file of image i, relative to root."""
        label, file = self.files[i]
        return f"{self._folders[label]}/{file}"

    def _check_depth(self, listings: Mapping[str, Listing]) -> None:
        """Refuse folders of class folders; ``<class>/images/*`` (Tiny ImageNet) is accepted."""
        inner = {
            file.partition("/")[0] if "/" in file else ""
            for found in listings.values()
            for file in found.images
        }
        if inner and "" not in inner and inner != {"images"}:
            name = next(name for name, found in listings.items() if found.images)
            raise DataError(
                f"{self.root}: its {count(listings, 'folder')} ({choices(listings, 3)}) have no"
                f" images but in folders of theirs: give the folder of the class folders, such as"
                f" {self.root / name}"
            )

    def _note(self, listings: Mapping[str, Listing], empty: Sequence[str]) -> None:
        for what, why in (("other", "no suffix of an image"), ("special", "not a regular file")):
            names = [
                f"{name}/{file}" for name in listings for file in getattr(listings[name], what)
            ]
            self.notes.left_out(names, self.root, why)
        if empty and len(self._folders) < len(listings):
            self.notes.add(
                f"{self.root}: left out {count(empty, 'folder')} without images:"
                f" {choices(map(escaped, empty), 3)}"
            )
        nested = [self.name(i) for i, (_, file) in enumerate(self.files) if "/" in file]
        if nested and len(nested) < len(self.files):
            self.notes.add(
                f"{self.root}: {count(nested, 'image')} of {len(self.files)} in folders of a class"
                f" folder, taken for that class: {choices(nested, 3)}"
            )
        odd = [self.name(i) for i in range(len(self)) if _undecodable(self._place(i))]
        if odd:
            self.notes.add(
                f"{self.root}: {count(odd, 'file name')} not in UTF-8, written with \\x:"
                f" {choices(odd, 3)}"
            )


class AnnotatedFolder(ImageFolderSamples):
    """The validation images of Tiny ImageNet: ``root/images/*``, with their classes in a list.

    Each line of ``root/val_annotations.txt`` is a file name, its class and a box, between tabs.
    """

    def __init__(self, root: str | Path) -> None:
        self.root, self.notes = Path(root), Notes()
        file = self.root / ANNOTATIONS
        rows = [line.split("\t")[:2] for line in read_lines(file)]
        if bad := [i for i, row in enumerate(rows, start=1) if len(row) != 2]:
            raise DataError(f"{file}, line {bad[0]}: no file name and class between tabs")
        if twice := unique(row[0] for row in rows):
            raise DataError(f"{file}: {twice} comes twice")
        there = listing(self.root / "images")
        listed = {row[0] for row in rows}
        if gone := sorted(listed - set(there.images)):
            raise DataError(f"{file}: no {count(gone, 'image')} of it: {choices(gone, 3)}")
        self.classes = tuple(sorted({row[1] for row in rows}))
        labels = {name: label for label, name in enumerate(self.classes)}
        self.files = sorted((labels[name], image) for image, name in rows)
        if not self.files:
            raise DataError(f"{file}: no lines")
        others = [name for name in there.images if name not in listed]
        self.notes.left_out(others, self.root / "images", f"not in {ANNOTATIONS}")

    def _place(self, i: int) -> str:
        return f"images/{self.files[i][1]}"


class ImageNetS(ImageFolderSamples):
    """Images in ``root/<split>/<class>/`` with masks of the same names in
    ``root/<split>-segmentation/``.

    The id of a class is its line number (from 1) in ``root/categories.txt`` or in
    ``ImageNetS_categories_im*.txt`` in root or ``root/data/categories``. Without such a file it is
    its rank among the sorted folder names; a folder without images is then refused, because it may
    not be a class.
    """

    has_masks = True

    def __init__(self, root: str | Path, split: str = "validation") -> None:
        root = Path(root)
        folders = class_folders(root / split)
        file = _categories_file(root, folders)
        classes = folders if file is None else _listed(file)
        if unknown := sorted(set(folders) - set(classes)):
            some = choices(map(escaped, unknown), 3)
            raise DataError(f"{root / split}: class folders not in {file}: {some}")
        super().__init__(root / split, classes)
        filled = {label for label, _ in self.files}
        if file is None and (empty := [n for i, n in enumerate(classes) if i not in filled]):
            raise DataError(
                f"{root / split}: no images in {choices(empty, 3)}: remove it if it is no class, or"
                f" list the classes in {root / CATEGORIES}, because ids in masks are ranks"
            )
        self.mask_root = root / f"{split}{MASKS}"
        self._masks = self._pairs()

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray]:
        image, label, _ = super().read(i)
        path = self.mask_root / self._masks[_stem(self._place(i))]
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

    def _pairs(self) -> dict[str, str]:
        """Image -> mask, both relative to their roots; the image without its suffix."""
        if not self.mask_root.is_dir():
            raise DataError(f"no folder {self.mask_root} with the masks of {self.root}")
        files = [
            f"{name}/{file}"
            for name in subfolders(self.mask_root)
            for file in listing(self.mask_root / name).images
            if file.lower().endswith(".png")
        ]
        masks = {_stem(file): file for file in files}
        images = [_stem(self._place(i)) for i in range(len(self))]
        for alone, kind, folder in (
            (set(images) - set(masks), "images without a mask", self.mask_root),
            (set(masks) - set(images), "masks without an image", self.root),
        ):
            if alone:
                some = choices(map(escaped, sorted(alone)), 3)
                raise DataError(f"{len(alone)} {kind} in {folder}: {some}")
        for names, kind in ((images, "images"), (list(map(_stem, files)), "masks")):
            if twice := unique(names):
                raise DataError(f"{self.root.parent}: two {kind} are called {escaped(twice)}")
        return masks


@dataclass(frozen=True)
class Listing:
    """Files in a folder and its subfolders: sorted names relative to it, without hidden ones.

    Parameters
    ----------
    images : files with an image suffix, in upper or lower case.
    other : files with another suffix.
    special : pipes, devices and sockets.
    """

    images: list[str]
    other: list[str]
    special: list[str]


def listing(folder: Path) -> Listing:
    """List a folder and its subfolders; links to folders are followed only at the top."""
    found = Listing([], [], [])
    waiting = [("", folder)]
    while waiting:
        before, here = waiting.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                name = f"{before}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=not before):
                    waiting.append((f"{name}/", Path(entry.path)))
                elif not entry.name.lower().endswith(SUFFIXES):
                    found.other.append(name)
                elif entry.is_file() or entry.is_symlink():  # reading a broken link fails later
                    found.images.append(name)
                else:
                    found.special.append(name)
    for names in (found.images, found.other, found.special):
        names.sort()
    return found


def _stem(file: str) -> str:
    return file.rpartition(".")[0]


def _undecodable(name: str) -> bool:
    return escaped(name) != name


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
    """Sorted names of the regular files in a folder that have an image suffix."""
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and (entry.is_file() or entry.is_symlink())
        ]
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _listed(file: Path) -> list[str]:
    names = read_lines(file)
    if twice := unique(names):
        raise DataError(f"{file}: {twice!r} comes twice")
    return names


def _categories_file(root: Path, folders: list[str]) -> Path | None:
    found = [root / CATEGORIES] if (root / CATEGORIES).exists() else []
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
