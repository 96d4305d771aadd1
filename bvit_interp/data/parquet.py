"""Images and integer labels in Hugging Face parquet files.

The layouts of `datasets.load_dataset` and the Hub: ``<split>.parquet`` or ``<split>-*.parquet`` in
the folder or in a subfolder, or the Hub's converted ``<configuration>/<split>/0000.parquet``. Class
names stand in the metadata of the schema. Shards, columns, class names and sizes are checked before
an image is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bvit_interp.data.files import check_regular
from bvit_interp.data.inventory import Notes, unique
from bvit_interp.data.samples import read_image
from bvit_interp.errors import DataError, MissingExtra, choices, first_line

IMAGES, LABELS = ("img", "image"), ("label", "fine_label")  # known column names
MOST_CLASSES = 1_000_000  # in a set without class names
ROWS = 256  # read at a time
_SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<of>\d+)(?=[.-])")
_PART = re.compile(r"\d+\.parquet")  # of the Hub's converted layout


class ParquetSamples:
    """The rows of one split; the compressed images stay in memory.

    Parameters
    ----------
    root : the folder.
    split : prefix of the file names.
    classes : class names if the files have none; by default "0", "1", ...
    native_size : side in pixels if all images are square and have one size.

    Raises
    ------
    DataError
        If files are missing or duplicated, a file has other columns or class names, or the images
        need more memory than there is.
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
        self.notes = Notes()
        files = split_files(root, split)
        if not files:
            raise DataError(f"{root}: no {split}.parquet or {split}-*.parquet")
        _check_shards(root, files)
        columns = [columns_of(file) for file in files]  # all are checked before one is read
        names, places = self._common_names(files, [names for _, _, names in columns])
        _check_memory(root, files, [image for image, _, _ in columns])
        self._images, self.labels = _joined(root, files, columns, places)
        highest = int(self.labels.max())
        if names is None and classes is None and highest >= MOST_CLASSES:
            raise DataError(f"{root}: {split} has a label {highest} and no class names")
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

    def content(self, i: int) -> bytes | None:
        """The compressed bytes of image i, None if its row has none."""
        row = self._images[i].as_py()
        return row.get("bytes") if isinstance(row, dict) else row

    def read(self, i: int) -> tuple[np.ndarray, int, None]:
        where = f"{self.root}/{self.split}/{i:06d}"
        content = self.content(i)
        if content is None:
            raise DataError(f"{where}: the row holds no image bytes")
        return read_image(content, where), int(self.labels[i]), None

    def _common_names(
        self, files: Sequence[Path], named: Sequence[list[str] | None]
    ) -> tuple[list[str] | None, list[np.ndarray | None]]:
        """The class names of the first file, and their positions for files in another order."""
        first, places = named[0], list[np.ndarray | None]()
        for file, names in zip(files, named, strict=True):
            if names == first:
                places.append(None)
                continue
            if not names or not first or unique(first) or sorted(names) != sorted(first):
                raise DataError(
                    f"{file}: its classes are not those of {files[0].name}:"
                    f" {_difference(names, first)}"
                )
            places.append(np.array([first.index(name) for name in names]))
        if others := [f.name for f, place in zip(files, places, strict=True) if place is not None]:
            self.notes.add(
                f"{self.root}: {choices(others, 3)} name the classes in another order than"
                f" {files[0].name}: labels are matched by name"
            )
        return first, places


class Columns(NamedTuple):
    """The columns of images and labels in a file, and the class names if it has any."""

    image: str
    label: str
    names: list[str] | None


def split_files(root: Path, split: str) -> list[Path]:
    """The parquet files of a split, in order; empty if there are none."""
    patterns = (
        f"{split}.parquet",
        f"{split}-*.parquet",
        f"*/{split}-*.parquet",
        f"{split}/*.parquet",
        f"*/{split}/*.parquet",
    )
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if pattern.endswith("/*.parquet"):
            found = [file for file in found if _PART.fullmatch(file.name)]
        if found:
            return found
    return []


def columns_of(file: Path) -> Columns:
    """The columns of a file, from its schema alone.

    Raises
    ------
    DataError
        If a column is missing or of a type that cannot hold images or labels.
    """
    schema = _parquet("read_schema", file)
    image, label = (
        next((name for name in kind if name in schema.names), None) for kind in (IMAGES, LABELS)
    )
    if image is None or label is None:
        wanted = " and ".join(" or ".join(kind) for kind in (IMAGES, LABELS))
        raise DataError(f"{file}: needs the columns {wanted}, has {choices(schema.names)}")
    if twice := unique(name for name in schema.names if name in (image, label)):
        raise DataError(f"{file}: has two columns {twice}")
    kind = schema.field(image).type
    if not _holds_bytes(kind):
        raise DataError(
            f"{file}: column {image} must hold the bytes of images, alone or as the field bytes of"
            f" a struct; it holds {_short(kind)}"
        )
    if not re.fullmatch(r"u?int\d+", str(schema.field(label).type)):
        raise DataError(
            f"{file}: column {label} must hold integers without gaps, it has"
            f" {_short(schema.field(label).type)}"
        )
    return Columns(image, label, _class_names(file, schema, label))


def _check_shards(root: Path, files: list[Path]) -> None:
    """Refuse missing and duplicate shards, and files from several folders or sets."""
    if len(folders := sorted({file.parent.relative_to(root).as_posix() for file in files})) > 1:
        some = " or ".join(folders)
        raise DataError(f"{root}: {files[0].name} and others in several folders: give {some}")
    shards = [_SHARD.search(file.name) for file in files]
    counted = [shard for shard in shards if shard]
    if not counted:
        if all(_PART.fullmatch(file.name) for file in files):
            _check_numbers(root, files, [int(file.stem) for file in files], None)
        return
    if len(counted) < len(files):
        one = next(f for f, shard in zip(files, shards, strict=True) if not shard)
        raise DataError(
            f"{root}: {one.name} is not one of the shards beside it, such as"
            f" {counted[0].string}: keep one of both in the folder"
        )
    sets = sorted({(shard.string[: shard.start()], int(shard["of"])) for shard in counted})
    if len(sets) > 1:
        some = choices(f"{name} of {of}" for name, of in sets)
        raise DataError(f"{root}: shards of several sets, {some}: keep one in the folder")
    _check_numbers(root, files, [int(shard["number"]) for shard in counted], sets[0][1])


def _check_numbers(root: Path, files: list[Path], numbers: list[int], of: int | None) -> None:
    """Refuse duplicate numbers, and gaps below `of` or up to the highest number."""
    if twice := [n for n in sorted(set(numbers)) if numbers.count(n) > 1]:
        raise DataError(f"{root}: two files are shard {twice[0]}, {files[0].name} and others")
    expected = range(max(numbers) + 1 if of is None else min(of, 100_000))
    missing = [n for n in expected if n not in set(numbers)]
    if missing or len(numbers) != len(expected):
        raise DataError(
            f"{root}: of the {len(expected)} files that {files[0].name} counts, {len(files)} are"
            f" there; missing: {choices(missing, 5)}"
        )


def _check_memory(root: Path, files: Sequence[Path], columns: Sequence[str]) -> None:
    """Refuse images that take more memory than there is, by the sizes that the files state."""
    size = 0
    for file, column in zip(files, columns, strict=True):
        about = _parquet("read_metadata", file)
        for group in (about.row_group(i) for i in range(about.num_row_groups)):
            parts = (group.column(i) for i in range(group.num_columns))
            size += sum(
                part.total_uncompressed_size
                for part in parts
                if part.path_in_schema.split(".")[0] == column
            )
    _refuse_size(root, size)


def _refuse_size(root: Path, size: int) -> None:
    if size > (most := memory()):
        raise DataError(
            f"{root}: the images take {size / 2**30:.1f} GiB of memory, {most / 2**30:.1f} GiB are"
            " free"
        )


def memory() -> int:
    """Bytes of memory that are free for this process, as far as the system reports."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):
        if told := re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text()):
            free = min(free, 1024 * int(told[1]))
    with suppress(OSError, ValueError):  # the limit of a container
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def _joined(
    root: Path,
    files: Sequence[Path],
    columns: Sequence[Columns],
    places: Sequence[np.ndarray | None],
) -> tuple[Any, np.ndarray]:
    """Image column and labels of all files."""
    images, labels, size = [], [], 0
    for file, (image, label, names), place in zip(files, columns, places, strict=True):
        for batch in _batches(file, [image, label]):
            size += batch.column(image).nbytes
            _refuse_size(root, size)  # a dictionary in the file may expand to far more
            images.append(_contents(batch.column(image)))
            labels.append(_labels(file, label, batch.column(label), names, place))
    if not sum(map(len, labels)):
        raise DataError(f"{root}: the parquet files have no rows")
    return _chunked(images), np.concatenate(labels)


def _chunked(parts: Sequence[Any]) -> Any:
    import pyarrow as pa

    return pa.chunked_array(parts)


def _contents(column: Any) -> Any:
    """The bytes of a column of structs or of bytes, in one type for all files."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_struct(column.type):
        column = compute.struct_field(column, "bytes")
    return column.cast(pa.large_binary())


def _labels(
    file: Path, label: str, column: Any, names: list[str] | None, place: np.ndarray | None
) -> np.ndarray:
    if column.null_count:
        raise DataError(
            f"{file}: column {label} must hold integers without gaps, {column.null_count} rows of"
            f" {len(column)} have none"
        )
    values = column.to_numpy(zero_copy_only=False)
    if len(values) and int(values.max()) >= 2**63:
        raise DataError(f"{file}: column {label} has {int(values.max())}")
    values = values.astype(np.int64)
    if place is None or not len(values):
        return values
    if values.min() < 0 or values.max() >= len(place):
        span = f"{values.min()}..{values.max()}"
        raise DataError(f"{file}: labels {span} for {len(names or ())} class names")
    return place[values]


def _batches(file: Path, columns: list[str]) -> Iterator[Any]:
    """Batches of rows of a file; an error of pyarrow becomes one line."""
    reader = _parquet("ParquetFile", file)
    try:
        with reader:
            yield from reader.iter_batches(ROWS, columns=columns)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{file}: its images do not fit into memory") from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{file}: truncated or not a parquet file ({first_line(error)})") from error


def _parquet(function: str, file: Path) -> Any:
    """Call a function of pyarrow.parquet; its errors become one line."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "parquet") from None
    try:
        check_regular(file)
        return getattr(pq, function)(file)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{file}: does not fit into memory") from error
    except (OSError, ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{file}: truncated or not a parquet file ({first_line(error)})") from error


def _class_names(file: Path, schema: Any, column: str) -> list[str] | None:
    """Class names that the `datasets` library wrote for a column, or None."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return None
    try:
        found = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: its metadata huggingface is not JSON") from error
    for key in ("info", "features", column):
        if not isinstance(found, dict):
            raise DataError(f"{file}: its metadata huggingface has no object around {key!r}")
        found = found.get(key, {})
    names = found.get("names") if isinstance(found, dict) else None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise DataError(f"{file}: its metadata names the classes by no list of texts")
    return names


def _holds_bytes(kind: Any) -> bool:
    """Whether a type is bytes, or a struct with a field `bytes` of that type."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_bytes(kind.field(index).type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)  # null: no images
    return any(test(kind) for test in tests)


def _short(kind: Any) -> str:
    text = " ".join(str(kind).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _difference(names: list[str] | None, first: list[str] | None) -> str:
    if not names or not first:
        return "one of both names none"
    if alone := [name for name in names if name not in first]:
        return f"{choices(alone, 3)} only here"
    if gone := [name for name in first if name not in names]:
        return f"{choices(gone, 3)} only there"
    return "in another order, and a name comes twice"
