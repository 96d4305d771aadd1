"""ImageNet's validation images with their localisation boxes as masks.

Images: ``val/<wnid>/*.JPEG``, or all in one folder as in ``ILSVRC/Data/CLS-LOC/val``. Boxes: the
XML files of the official archive, or else ``LOC_val_solution.csv``. XML files are preferred because
they state the size of the annotated picture. In the mask the id of the image's class is inside all
boxes of that class, and 0 is everywhere else (coding as in `samples`).

A box is given by its first and last pixel, **counted from 0, both inside**. The published boxes
follow this rule: in images 500 pixels wide, many go from 0 to 499. Pascal VOC counts from 1, so the
last pixel of such a box may equal the width. This one extra pixel is cut off. A box that goes
further is refused.

If an image has another size than its XML file states, its boxes are scaled, each axis
independently. A pixel is in a box if its centre is, as if the mask had been resized to the nearest
pixel. A box too thin to contain a centre keeps one pixel. Scaling is right for resized or squashed
copies, but not for cropped ones.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from timm.data import ImageNetInfo

from bvit_interp.data.files import escaped
from bvit_interp.data.folders import image_files, subfolders
from bvit_interp.data.samples import read_image
from bvit_interp.errors import DataError, choices, first_line

CSV = "LOC_val_solution.csv"
HEADER = ["ImageId", "PredictionString"]
IMAGES = ("ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "val")  # possible folders, in order
XML = (
    "ILSVRC/Annotations/CLS-LOC/val",
    "Annotations/CLS-LOC/val",
    "bbox/val",
    "bboxes/val",
    "ILSVRC2012_bbox_val_v3/val",
    "val",
)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Box(NamedTuple):
    """A class, and the first and last column and row of its box, from 0, both inside."""

    wnid: str
    left: int
    top: int
    right: int
    bottom: int

    def __str__(self) -> str:
        return " ".join(map(str, self))


@dataclass(frozen=True)
class Boxes:
    """The boxes of one image.

    Parameters
    ----------
    source : the file of the boxes, or the line in it, for error messages.
    boxes : the boxes, in pixels of the annotated picture.
    size : width and height of that picture in pixels, if the source states them.
    """

    source: str
    boxes: tuple[Box, ...]
    size: tuple[int, int] | None = None

    def mask(self, wnid: str, class_id: int, height: int, width: int) -> np.ndarray:
        """Class ids ``(height, width)`` int32: `class_id` inside the boxes of `wnid`, else 0.

        Raises
        ------
        DataError
            If a box lies outside the annotated picture. If no size is stated, it is the image.
        """
        stated_width, stated_height = self.size or (width, height)
        ids = np.zeros((height, width), np.int32)
        for box in self.boxes:
            _check_inside(box, stated_width, stated_height, self.source)
            if box.wnid == wnid:
                rows = _pixels(box.top, box.bottom, stated_height, height)
                ids[rows, _pixels(box.left, box.right, stated_width, width)] = class_id
        return ids


class ImageNetBoxes:
    """The validation images, sorted by wnid and file name, with masks made from their boxes.

    Parameters
    ----------
    root : the folder with images and boxes; `IMAGES`, `XML` and `CSV` list where they may be.

    Raises
    ------
    DataError
        If images or boxes are missing, an image has no box of its class, a box has an unknown
        wnid, or a line or XML file is malformed. The message names the file.
    """

    native_size: int | None = None
    has_masks = True

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.image_root = _image_root(self.root)
        folders, loose = subfolders(self.image_root), image_files(self.image_root)
        if folders and loose:
            raise DataError(f"{self.image_root}: images beside class folders, {loose[0]} for one")
        self._flat = not folders
        found = [("", file) for file in loose]
        found += [(name, file) for name in folders for file in image_files(self.image_root / name)]
        if not found:
            raise DataError(f"{self.image_root}: no images")
        source, boxes = _boxes_in(self.root, [Path(file).stem for _, file in found])
        if alone := [file for _, file in found if not boxes[Path(file).stem].boxes]:
            where = f"{self.image_root} have no box in {source}"
            raise DataError(f"{len(alone)} images of {where}: {choices(alone, 3)}")
        wnids = [name or _only_wnid(boxes[Path(file).stem]) for name, file in found]
        self.classes: tuple[str, ...] = tuple(sorted(folders or set(wnids)))
        label = {wnid: i for i, wnid in enumerate(self.classes)}
        labels = [label[wnid] for wnid in wnids]
        self.files = sorted(zip(labels, (file for _, file in found), strict=True))
        self._boxes = [boxes[Path(file).stem] for _, file in self.files]
        self._check_classes(set(self.classes) if folders else _imagenet())

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        label, file = self.files[i]
        return f"{self.classes[label]}/{escaped(file)}"

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray]:
        label, file = self.files[i]
        path = self.image_root / (file if self._flat else f"{self.classes[label]}/{file}")
        image = read_image(path, str(path))
        height, width = image.shape[:2]
        return image, label, self._boxes[i].mask(self.classes[label], label + 1, height, width)

    def _check_classes(self, known: set[str]) -> None:
        for (label, file), boxes in zip(self.files, self._boxes, strict=True):
            named = [box.wnid for box in boxes.boxes]
            if unknown := [wnid for wnid in named if wnid not in known]:
                known_are = "ImageNet's 1000" if self._flat else f"the folders of {self.image_root}"
                raise DataError(f"{boxes.source}: a box of {unknown[0]!r}, none of {known_are}")
            if self.classes[label] not in named:
                has = f"boxes of {choices(sorted(set(named)))}"
                raise DataError(f"{boxes.source}: {has}, but {file} is {self.classes[label]}")


def _image_root(root: Path) -> Path:
    for folder in IMAGES:
        if (root / folder).is_dir():
            return root / folder
    raise DataError(f"{root}: no folder {' or '.join(IMAGES[::-2])} with the validation images")


def _boxes_in(root: Path, stems: Sequence[str]) -> tuple[Path, dict[str, Boxes]]:
    """The folder or file of the boxes, and the boxes of each image (empty if it has none)."""
    for name in XML:
        folder = root / name
        if any(folder.glob("*.xml")):
            files = {stem: folder / f"{stem}.xml" for stem in stems}
            none = Boxes(str(folder), ())
            read = {stem: _from_xml(f) if f.is_file() else none for stem, f in files.items()}
            return folder, read
    file = root / CSV
    if not file.is_file():
        raise DataError(f"{root}: no boxes: neither {CSV} nor XML files in {XML[0]} or bbox/val")
    rows = _from_csv(file)
    return file, {stem: rows.get(stem, Boxes(str(file), ())) for stem in stems}


def _from_csv(file: Path) -> dict[str, Boxes]:
    """The boxes of every image in a file with lines ``ImageId,wnid x1 y1 x2 y2 wnid x1 ...``."""
    found: dict[str, Boxes] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.reader(lines)
            if next(rows, None) != HEADER:
                raise DataError(f"{file}: its first line is not {','.join(HEADER)}")
            for row in filter(None, rows):
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(HEADER):
                    raise DataError(f"{where}: {len(row)} fields, not {' and '.join(HEADER)}")
                if row[0] in found:
                    raise DataError(f"{where}: {row[0]!r} has a line already")
                words = row[1].split()
                if len(words) % 5:
                    raise DataError(f"{where}: {len(words)} words; a box is wnid x1 y1 x2 y2")
                starts = range(0, len(words), 5)
                boxes = [_box(where, words[k], words[k + 1 : k + 5]) for k in starts]
                found[row[0]] = Boxes(where, tuple(boxes))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({first_line(error)})") from error
    return found


def _from_xml(file: Path) -> Boxes:
    """The boxes of one file in Pascal VOC layout: a size, and objects with name and bndbox."""
    try:
        tree = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError, UnicodeDecodeError, LookupError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as XML ({first_line(error)})") from error
    boxes = []
    for thing in tree.iter("object"):
        corners = [thing.findtext(f"bndbox/{corner}") for corner in CORNERS]
        boxes.append(_box(str(file), (thing.findtext("name") or "").strip(), corners))
    if tree.find("size") is None:
        return Boxes(str(file), tuple(boxes))
    stated = [tree.findtext(f"size/{side}") for side in ("width", "height")]
    numbers = _whole(stated)
    if numbers is None or min(numbers) < 1:
        raise DataError(f"{file}: states a size of {' x '.join(map(repr, stated))} pixels")
    for box in boxes:
        _check_inside(box, numbers[0], numbers[1], str(file))
    return Boxes(str(file), tuple(boxes), (numbers[0], numbers[1]))


def _box(where: str, wnid: str, corners: Sequence[str | None]) -> Box:
    numbers = _whole(corners)
    said = " ".join(" ".join([wnid or "without a name", *map(str, corners)]).split())  # one line
    if not wnid or numbers is None:
        raise DataError(f"{where}: box {said}: needs a wnid and whole numbers {', '.join(CORNERS)}")
    left, top, right, bottom = numbers
    if not (0 <= left <= right and 0 <= top <= bottom):
        raise DataError(f"{where}: box {said}: begins before 0 or ends before it begins")
    return Box(wnid, left, top, right, bottom)


def _whole(texts: Iterable[str | None]) -> list[int] | None:
    """The texts as whole numbers, or None if one of them is not a whole number."""
    try:
        return [int(text or "") for text in texts]
    except ValueError:
        return None


def _check_inside(box: Box, width: int, height: int, source: str) -> None:
    """Refuse a box outside its picture; one extra pixel is allowed, for boxes that count from 1."""
    if box.left >= width or box.right > width or box.top >= height or box.bottom > height:
        raise DataError(f"{source}: box {box} lies beyond its image of {width} x {height} pixels")


def _pixels(first: int, last: int, stated: int, stored: int) -> slice:
    """The `stored` pixels whose centre lies in first..last of the `stated` pixels; at least one."""
    edges = (first, min(last + 1, stated))
    start, stop = (-((stated - 2 * edge * stored) // (2 * stated)) for edge in edges)  # rounded up
    if start < stop:
        return slice(start, stop)
    middle = (edges[0] + edges[1]) * stored // (2 * stated)
    return slice(middle, middle + 1)


def _only_wnid(boxes: Boxes) -> str:
    """The class of an image without a class folder: the one class of its boxes."""
    named = sorted({box.wnid for box in boxes.boxes})
    if len(named) > 1:
        raise DataError(f"{boxes.source}: boxes of {choices(named)}: which is the image's class?")
    return named[0]


def _imagenet() -> set[str]:
    """The wnids of ImageNet-1k."""
    return set(ImageNetInfo().label_names())
