"""Data sets by name: open, list or export one.

A set is named ``NAME`` (the folder ``$BVIT_INTERP_DATA/NAME``, by default ``./data/NAME``),
``NAME:PATH``, or ``PATH`` alone; the files in PATH then show which kind of set it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from bvit_interp.data.boxes import ImageNetBoxes
from bvit_interp.data.cifar import BINARIES, CIFAR10, Name, open_cifar
from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.files import expanded, read_lines, say
from bvit_interp.data.folders import (
    ANNOTATIONS,
    CATEGORIES,
    MASKS,
    AnnotatedFolder,
    ImageFolderSamples,
    ImageNetS,
    class_folders,
    image_files,
    subfolders,
)
from bvit_interp.data.imagenette import is_imagenette, open_imagenette, wnids_of
from bvit_interp.data.parquet import ParquetSamples, columns_of, split_files
from bvit_interp.data.samples import Samples, evenly_spaced, write_mask
from bvit_interp.errors import DataError, choices
from bvit_interp.results import remove_leftovers, replacing

HOME = "BVIT_INTERP_DATA"  # environment variable: the folder of data sets
_EXPORTED = ".exported"  # in the folder of an export: which it is


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A data set that can be opened by name; `needs` says which files its folder must hold."""

    name: str
    summary: str
    splits: tuple[str, ...]
    default_split: str | None
    needs: str
    has_masks: bool = False
    downloads: bool = False
    open: Callable[[Path, str | None, bool], Samples]


def _open_digits(root: Path, split: str | None, download: bool) -> Samples:
    return DigitScenes(str(split))


def _cifar_opener(name: Name) -> Callable[[Path, str | None, bool], Samples]:
    return lambda root, split, download: open_cifar(name, root, str(split), download)


def _open_imagenette(root: Path, split: str | None, download: bool) -> Samples:
    return open_imagenette(root, str(split))


def _open_imagenet(root: Path, split: str | None, download: bool) -> Samples:
    return ImageFolderSamples(root / str(split))


def _open_imagenet_s(root: Path, split: str | None, download: bool) -> Samples:
    return ImageNetS(root, str(split))


def _open_imagenet_boxes(root: Path, split: str | None, download: bool) -> Samples:
    return ImageNetBoxes(root)


def _open_folder(root: Path, split: str | None, download: bool) -> Samples:
    """A split, by default the first that exists; the folder itself if it has no splits.

    A set of training images alone is read only when its split is named.
    """
    found = _splits_in(root)
    if split is not None and split not in found:
        has = choices(found) or "one only, the folder itself"
        raise DataError(f"{root} has no split {split!r}; splits: {has}")
    if not found:
        return ImageFolderSamples(root)
    if split is None and list(found) == ["train"]:
        raise DataError(
            f"{root}: its only split is train, which models are trained on: say --split train to"
            " use it, or give a folder with one of " + choices(_FOLDER_SPLITS[:-1])
        )
    chosen = split or next(iter(found))
    if split is None and len(found) > 1:
        say(f"{root}: reading the split {chosen}, of {choices(found)}")
    folder = found[chosen]
    if folder is None:
        return ParquetSamples(root, chosen)
    return (
        AnnotatedFolder(folder) if (folder / ANNOTATIONS).exists() else ImageFolderSamples(folder)
    )


def _splits_in(root: Path) -> dict[str, Path | None]:
    """The splits that a folder holds, in the order of `_FOLDER_SPLITS`, and their class folders;
    None for parquet files."""
    folders = {name.lower(): root / name for name in subfolders(root)} if root.is_dir() else {}
    found: dict[str, Path | None] = {}
    for name in _FOLDER_SPLITS:
        if split_files(root, name):
            found[name] = None
        elif name in folders and _is_split_folder(folders[name]):
            found[name] = folders[name]
    return found


def _is_split_folder(folder: Path) -> bool:
    """Whether a folder with the name of a split holds class folders, so that it is not a class.

    Images without classes (``test/images`` of Tiny ImageNet) are no split.
    """
    inner = subfolders(folder)
    if inner == ["images"]:
        return (folder / ANNOTATIONS).exists()
    return bool(inner) and not image_files(folder)


_FOLDER_SPLITS = ("test", "val", "validation", "valid", "dev", "train")
CATALOG = (
    Entry(
        name="digits-s",
        summary="handwritten digits hidden in photographs, 32 px, made on the fly",
        splits=("train", "test"),
        default_split="test",
        needs="",
        has_masks=True,
        open=_open_digits,
    ),
    Entry(
        name="cifar10",
        summary="CIFAR-10, 32 px photographs of 10 classes",
        splits=("train", "test"),
        default_split="test",
        needs="train/test.parquet or cifar-10-batches-py/",
        downloads=True,
        open=_cifar_opener("cifar10"),
    ),
    Entry(
        name="cifar100",
        summary="CIFAR-100, 32 px photographs of 100 classes",
        splits=("train", "test"),
        default_split="test",
        needs="train/test.parquet or cifar-100-python/",
        downloads=True,
        open=_cifar_opener("cifar100"),
    ),
    Entry(
        name="imagenette",
        summary="Imagenette, photographs of 10 classes of ImageNet",
        splits=("train", "test"),
        default_split="test",
        open=_open_imagenette,
        needs="train/test.parquet or imagenette2/ (-320, -160) with train/ and val/<wnid>/*.JPEG",
    ),
    Entry(
        name="imagenet",
        summary="ImageNet-1k, a folder per wnid",
        splits=("train", "val"),
        default_split="val",
        needs="val/<wnid>/*.JPEG",
        open=_open_imagenet,
    ),
    Entry(
        name="imagenet-s",
        summary="ImageNet-S 50, 300 or 919, or any set in its layout",
        splits=("validation", "train-semi"),
        default_split="validation",
        has_masks=True,
        needs="validation/<class>/*.JPEG and validation-segmentation/<class>/*.png",
        open=_open_imagenet_s,
    ),
    Entry(
        name="imagenet-boxes",
        summary="ImageNet's validation images, their boxes as masks",
        splits=("val",),
        default_split="val",
        has_masks=True,
        open=_open_imagenet_boxes,
        needs="val/<wnid>/*.JPEG or Kaggle's ILSVRC/, and LOC_val_solution.csv or XML files",
    ),
    Entry(
        name="folder",
        summary="your own images, a folder per class, or Hugging Face parquet",
        splits=_FOLDER_SPLITS,
        default_split=None,
        open=_open_folder,
        needs="<class>/*.jpg, <split>/<class>/*.jpg or <split>.parquet",
    ),
)
_ENTRIES = {entry.name: entry for entry in CATALOG}


def open_samples(spec: str, split: str | None = None, download: bool = False) -> Samples:
    """Open a data set.

    Parameters
    ----------
    spec : ``NAME``, ``NAME:PATH`` or ``PATH``; a name of the catalog is preferred to a folder of
        the same name.
    split : one of the set's splits; by default the one for evaluation.
    download : download the set if it is missing (CIFAR only).

    Raises
    ------
    DataError
        If the name or split is unknown (the message lists the valid ones), the path is empty, or
        the set is inconsistent.
    """
    entry, root = _resolve(spec)
    if split is not None and split not in entry.splits:
        raise DataError(f"{entry.name} has no split {split!r}; splits: {choices(entry.splits)}")
    if download and not entry.downloads:
        able = choices(entry.name for entry in CATALOG if entry.downloads)
        raise DataError(f"{entry.name} cannot be downloaded; these can: {able}")
    if entry.needs and not download and not root.is_dir():
        ways = [
            f"say {entry.name}:PATH",
            f"set ${HOME}",
            *(["use --download"] if entry.downloads else []),
        ]
        raise DataError(
            f"{entry.name}: no folder {root}, which should hold {entry.needs}; {' or '.join(ways)}"
        )
    return entry.open(root, split or entry.default_split, download)


def listing() -> list[dict[str, str]]:
    """One row per data set: name, splits, masks, summary, its folder and whether it exists."""
    return [
        {
            "name": entry.name,
            "splits": ", ".join(entry.splits),
            "masks": "yes" if entry.has_masks else "no",
            "summary": entry.summary,
            "where": _where(entry),
        }
        for entry in CATALOG
    ]


def export(samples: Samples, out: Path, limit: int | None = None, progress: bool = True) -> int:
    """Write a set with masks in ImageNet-S layout, as PNG; returns the number of images written.

    The folder appears only when it is complete; an export that is there already is not repeated.
    `limit` images are evenly spaced over the set.

    Raises
    ------
    DataError
        For a set without masks, a folder with anything else in it, or one that cannot be written.
    """
    if not samples.has_masks:
        able = choices(entry.name for entry in CATALOG if entry.has_masks)
        raise DataError(f"only a set with masks can be exported; of the catalog: {able}")
    out = expanded(str(out))
    chosen = evenly_spaced(len(samples), limit)
    content = _content_key(samples, chosen)
    if (out / _EXPORTED).is_file() and read_lines(out / _EXPORTED) == [content]:
        say(f"{out} holds this export already; to write it again, remove the folder first")
        return len(chosen)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not empty: give a new folder")
    remove_leftovers(out.parent)
    try:
        with replacing(out) as complete:
            complete.mkdir()
            (complete / CATEGORIES).write_text("\n".join(samples.classes))
            for i in tqdm(chosen, desc=f"export to {out}", unit="image", disable=not progress):
                _write(samples, i, complete)
            (complete / _EXPORTED).write_text(content)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    return len(chosen)


def _content_key(samples: Samples, chosen: list[int]) -> str:
    """A hash of what is exported: the classes, and the names of the images."""
    names = [samples.name(i) for i in chosen]
    return hashlib.sha256(repr((list(samples.classes), names)).encode()).hexdigest()


def _write(samples: Samples, i: int, out: Path) -> None:
    image, label, mask = samples.read(i)
    if mask is None:
        raise DataError(f"{samples.name(i)} has no mask")
    file = f"{Path(samples.name(i)).stem}.png"
    folders = [out / tree / samples.classes[label] for tree in ("validation", f"validation{MASKS}")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if (folders[0] / file).exists():
        raise DataError(
            f"{samples.name(i)}: another image of {samples.classes[label]} is called {file} too"
        )
    Image.fromarray(image).save(folders[0] / file)
    write_mask(mask, folders[1] / file)


def _resolve(spec: str) -> tuple[Entry, Path]:
    """The entry and the folder of a spec."""
    name, colon, path = spec.partition(":")
    if name in _ENTRIES:
        entry = _ENTRIES[name]
        if colon and not entry.needs:
            raise DataError(f"{name} is made on the fly and takes no path, got {path!r}")
        if colon and not path:
            raise DataError(f"{spec}: the path after the colon is missing")
        return entry, expanded(path) if colon else _home() / name
    folder = expanded(spec)
    if folder.is_dir():
        return _ENTRIES[_kind(folder)], folder
    if folder.exists():
        raise DataError(f"{folder} is a file: give the folder it is in")
    raise DataError(f"no data set or folder {spec!r}; data sets: {choices(_ENTRIES)}")


def _kind(folder: Path) -> str:
    """The name of the entry that fits the files in a folder."""
    if any(folder.glob(f"*{MASKS}")):
        return "imagenet-s"
    for name, binaries in BINARIES.items():
        if folder.name == binaries or (folder / binaries).is_dir():
            return name
    if is_imagenette(folder):
        return "imagenette"
    for split in _FOLDER_SPLITS:
        if files := split_files(folder, split):
            _, label, names = columns_of(files[0])
            if label == "fine_label":
                return "cifar100"
            if wnids_of(names):
                return "imagenette"
            return "cifar10" if names == list(CIFAR10) else "folder"
    class_folders(folder)
    return "folder"


def _home() -> Path:
    return expanded(os.environ.get(HOME) or "data")


def _where(entry: Entry) -> str:
    if not entry.needs:
        return "built in"
    root = _home() / entry.name
    return f"{root} ({'found' if root.is_dir() else 'missing'})"
