"""Images and integer labels in Hugging Face parquet files.

The layout of `datasets.load_dataset` and the Hub: ``<split>.parquet`` or ``<split>-*.parquet`` in
the folder or in a subfolder, with the class names in the metadata of the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bvit_interp.data.samples import first_line, read_image
from bvit_interp.errors import DataError, MissingExtra, choices

IMAGES, LABELS = ("img", "image"), ("label", "fine_label")  # known column names


class ParquetSamples:
    """The rows of one split; the compressed images stay in memory.

    Parameters
    ----------
    root : the folder.
    split : start of the files' names.
    classes : class names if the files have none; by default "0", "1", ...
    native_size : side of the images in pixels if all have the same.
    """

    has_masks = False
    official: bool = False

    def __init__(
        self,
        root: Path,
        split: str,
        classes: Sequence[str] | None = None,
        native_size: int | None = None,
    ) -> None:
        self.root, self.split, self.native_size = root, split, native_size
        files = split_files(root, split)
        if not files:
            raise DataError(f"{root}: no {split}.parquet or {split}-*.parquet")
        _check_shards(root, files)
        tables = [_read(file) for file in files]
        self._images, self.labels, names = _joined(tables, root)
        highest = int(self.labels.max())
        self.classes: tuple[str, ...] = tuple(names or classes or map(str, range(highest + 1)))
        if self.labels.min() < 0 or highest >= len(self.classes):
            span = f"{self.labels.min()}..{highest}"
            raise DataError(
                f"{root}: {split} has labels {span} for {len(self.classes)} class names"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"{self.root.name}/{self.split}/{i:06d}"

    def read(self, i: int) -> tuple[np.ndarray, int, None]:
        where = f"{self.root}/{self.split}/{i:06d}"
        content = (self._images[i].as_py() or {}).get("bytes")
        if content is None:
            raise DataError(f"{where}: the row holds no image bytes")
        return read_image(content, where), int(self.labels[i]), None


def split_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split, in order; empty if there are none."""
    patterns = (f"{split}.parquet", f"{split}-*.parquet", f"*/{split}-*.parquet")
    return next((found for pattern in patterns if (found := sorted(root.glob(pattern)))), [])


def columns_of(file: Path) -> tuple[str, str, list[str] | None]:
    """Names of the image column and the label column, and the class names if the file has them."""
    schema = _parquet("read_schema", file)
    columns = [
        next((name for name in kind if name in schema.names), None) for kind in (IMAGES, LABELS)
    ]
    if columns[0] is None or columns[1] is None:
        wanted = " and ".join(" or ".join(kind) for kind in (IMAGES, LABELS))
        raise DataError(f"{file}: needs the columns {wanted}, has {choices(schema.names)}")
    return columns[0], columns[1], _class_names(schema, columns[1])


def _check_shards(root: Path, files: list[Path]) -> None:
    """Refuse missing shards, and files in several folders, which are versions of one set."""
    if len(folders := sorted({file.parent.name for file in files})) > 1:
        some = " or ".join(folders)
        raise DataError(f"{root}: {files[0].name} and others in several folders: give {some}")
    of = {int(found[1]) for file in files if (found := re.search(r"-of-(\d+)", file.name))}
    if of and of != {len(files)}:
        raise DataError(f"{root}: of the files that {files[0].name} counts, {len(files)} are there")


def _read(file: Path) -> tuple[Any, np.ndarray, list[str] | None]:
    """Image column, labels and class names of one file."""
    image, label, names = columns_of(file)
    table = _parquet("read_table", file, columns=[image, label])
    labels = table[label].to_numpy()
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{file}: column {label} must hold integers without gaps, it has {labels.dtype}"
        )
    return table[image], labels.astype(np.int64), names


def _parquet(function: str, file: Path, **options: Any) -> Any:
    """Call a function of pyarrow.parquet, with its errors as one line."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "parquet") from None
    try:
        return getattr(pq, function)(file, **options)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{file}: truncated or not a parquet file ({first_line(error)})") from error


def _joined(tables: list[Any], root: Path) -> tuple[Any, np.ndarray, list[str] | None]:
    import pyarrow as pa

    images = pa.chunked_array([chunk for column, _, _ in tables for chunk in column.chunks])
    labels = np.concatenate([part for _, part, _ in tables])
    if not len(labels):
        raise DataError(f"{root}: the parquet files have no rows")
    if any(names != tables[0][2] for _, _, names in tables):
        raise DataError(f"{root}: the parquet files name their classes differently")
    return images, labels, tables[0][2]


def _class_names(schema: Any, column: str) -> list[str] | None:
    """Class names that the `datasets` library wrote for a column, or None."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return written.get("info", {}).get("features", {}).get(column, {}).get("names")
