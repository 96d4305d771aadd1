"""Output: atomic writes, locks, provenance, and tables that continue after a kill.

A result is `<word>.csv` and `<word>.png` with `<word>.json` beside them: the options, the weights'
hashes, versions and the command that made them. Under torchrun only the first process writes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lazy_loader
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from bvit_interp.errors import UserError, choices

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import pandas as pd
else:  # models and probes need no tables
    pd = lazy_loader.load("pandas")

_LIBRARIES = ("bvit-interp", "torch", "torchvision", "timm", "captum", "numpy", "pandas")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) when not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, for a file or a folder, that takes its place when the block
    ends well, and vanishes otherwise. That of a killed process stays until `locked` finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Lock:
    """A lock on a folder, held as long as something refers to this object."""

    def __init__(self, handle: int) -> None:
        self.release = weakref.finalize(self, os.close, handle)


_LOCKS: weakref.WeakValueDictionary[tuple[int, int], Lock] = weakref.WeakValueDictionary()
"""Device and inode of a folder -> its lock in this process."""


def _release_all() -> None:
    """Close the handles of a forked process, which would hold the locks after its parent's end."""
    for lock in list(_LOCKS.values()):
        lock.release()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_release_all)


def locked(folder: Path) -> Lock | None:
    """Keep the runs of other processes out of a folder while the result is kept.

    It also removes what killed processes left in the folder. A process may lock a folder several
    times. The lock of a process that ends, or is killed, ends with it, and leaves no file.

    Returns
    -------
    The lock; None where nothing is locked: in other processes of torchrun than the first, in a
    folder that does not exist yet, and on file systems without locks, as some of networks are.

    Raises
    ------
    UserError
        If another process has locked the folder.
    """
    if sys.platform == "win32" or rank_and_world()[0] > 0:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    about = os.fstat(handle)
    held = _LOCKS.get((about.st_dev, about.st_ino))
    if held is not None:
        os.close(handle)
        return held
    lock = Lock(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another run is writing to this folder; wait until it ends, or give another"
            " --out"
        ) from None
    except OSError:
        return None
    _LOCKS[about.st_dev, about.st_ino] = lock
    remove_leftovers(folder)
    return lock


_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")
_LEFTOVER_AGE = 300.0  # seconds; a process of another host may still be writing a younger file


def remove_leftovers(folder: Path) -> None:
    """Remove old temporary files of `replacing` whose process has ended, here and one level
    below."""
    for path in (*folder.glob(".*.partial"), *folder.glob("*/.*.partial")):
        match = _PARTIAL.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        with suppress(OSError):  # gone, or of another user
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE:
                _remove(path)


def _is_alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except PermissionError:  # of another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV whose floats `read_table` reads back exactly."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV of `write_table`: floats exactly, models by name also where that is 007 or
    null.

    Raises
    ------
    UserError
        For what is no such table: lines that are cut off or of another number of values, a column
        twice, and text where numbers stand (`value`, `low`, `n`, ...); it names line and column.
    """
    lines = _checked_lines(path)
    exact: dict[str, Any] = {"float_precision": "round_trip"}
    # there the default is exact, the option deprecated
    if tuple(map(int, pd.__version__.split(".")[:2])) >= (
        3,
        1,
    ):
        exact = {}
    try:
        frame = pd.read_csv(
            path, dtype={"model": str}, keep_default_na=False, na_values=[""], **exact
        )
    except ValueError as error:  # pandas' ParserError and EmptyDataError are ones
        raise UserError(f"{path}: not a table ({' '.join(str(error).split())})") from error
    for place, column in enumerate(frame):
        numeric = pd.api.types.is_numeric_dtype(frame[column])
        if _NUMBERS.fullmatch(str(column)) and len(frame) and not numeric:
            line, text = next((n, row[place]) for n, row in lines if not _is_number(row[place]))
            raise UserError(f"{path}: line {line}, column {column}: {text[:40]!r} is no number")
    return frame


_NUMBERS = re.compile(
    r"n|n_.*|value|x|y|(.*_)?(low|high|null|accuracy|loss|chance|ratio|rank|share|gflops)"
)
"""Columns that hold numbers, or nothing, in every table."""


def _checked_lines(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV, each with the number of the line that it ends on."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        rows = [(reader.line_num, row) for row in reader if row]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a table ({' '.join(str(error).split())})") from error
    if not header:
        raise UserError(f"{path}: not a table (it is empty)")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path}: not a table (column {twice[0]} is there twice)")
    for line, row in rows:
        if len(row) != len(header):
            many = f"{len(row)} values for {len(header)} columns"
            raise UserError(f"{path}: not a table (line {line} has {many})")
    if not text.endswith("\n"):
        last = rows[-1][0] if rows else 1
        raise UserError(f"{path}: not a table (line {last} is cut off)")
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as a compressed ``.npz``; under torchrun only the first process writes."""
    if rank_and_world()[0] == 0:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def file_stem(name: str) -> str:
    """A model's name as part of a file name: without "/" and "@"."""
    return name.replace("/", "_").replace("@", "_")


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON, indented."""
    with replacing(path) as temporary:
        temporary.write_text(_as_json(content))


def write_result(frame: pd.DataFrame, about: Mapping[str, Any], path: Path) -> None:
    """Write a table and, beside it, the `.json` of what made it.

    Both are whole before either takes its place, and a table never lies beside the `.json` of
    another one: a process killed in between leaves the `.json` without a table.
    """
    with replacing(path) as table, replacing(path.with_suffix(".json")) as beside:
        frame.to_csv(table, index=False)
        beside.write_text(_as_json(about))
        path.unlink(missing_ok=True)


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, default=str) + "\n"


def weights_hash(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of a model's weights, by name; a model and its unroll
    share it.

    Each tensor counts once, under its first name without block numbers (a step of an unroll has
    another).
    """
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (re.sub(r"\.\d+\b", "", name), tensor))
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.values(), key=lambda named: named[0]):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def provenance(options: Mapping[str, Any]) -> dict[str, Any]:
    """What made a result: options, command, date, machine and versions."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    program = Path(sys.argv[0]).name
    if program == "__main__.py":  # python -m bvit_interp.cli, or torchrun
        program = "bvit-interp"
    return {
        "options": json.loads(json.dumps(options, default=str)),
        "command": " ".join([program, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
    }


def refuse_other_options(path: Path, options: Mapping[str, Any], whole: str = "") -> None:
    """Refuse to replace or to continue a table that was made with other options.

    Parameters
    ----------
    path : the CSV; its options lie in the `.json` beside it. None need be there.
    options : what the rows depend on. Options that the `.json` has beside these do not matter.
    whole : an option, a mapping, beside whose entries the `.json` must have no others.

    Raises
    ------
    UserError
        If a table is there, with other options or without any.
    """
    if not path.exists():
        return
    try:
        found = _flat(json.loads(path.with_suffix(".json").read_text())["options"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} exists without its options; --overwrite replaces it") from None
    wanted: dict[str, Any] = {
        key: None for key in found if whole and key.startswith(f"{whole}.")
    } | _flat(json.loads(json.dumps(options, default=str)))
    differing = [
        f"{key}: {found.get(key)!r} there, {value!r} now"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if differing:
        raise UserError(
            f"{path} was made with other options ({'; '.join(differing)}); give"
            " another --out or --overwrite"
        )


class Table:
    """A table that grows by finished units and continues where it stopped.

    Parameters
    ----------
    path : the CSV; its options lie in the `.json` beside it.
    options : what the rows depend on; a table made with others is refused, not mixed. Options that
        the `.json` has beside these do not matter. One with other columns than the new rows is
        refused when that is first seen.
    overwrite : start again instead; what is there stays until the first new row is finished.

    Raises
    ------
    UserError
        For a table of other options, and in a folder that another process has `locked`. The table
        locks its folder, if that exists yet, else with the first row.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.options = json.loads(json.dumps(options, default=str))
        self.rows: list[dict[str, Any]] = []
        self.columns: frozenset[str] | None = None  # of the rows found
        self._lock = locked(path.parent)
        if path.exists() and not overwrite:
            refuse_other_options(path, self.options)
            found = read_table(path)
            self.rows += found.to_dict("records")  # type: ignore[arg-type]
            self.columns = frozenset(map(str, found))

    def has(self, **keys: Any) -> bool:
        """Whether a row with these values is there.

        Raises
        ------
        UserError
            If the table that was found lacks one of these columns.
        """
        if self.columns is not None:
            self._check_columns(keys.keys() - self.columns)
        return any(all(row.get(key) == value for key, value in keys.items()) for row in self.rows)

    def _check_columns(self, lacking: Set[str], foreign: Set[str] = frozenset()) -> None:
        kinds = {"lacks": lacking, "has the unknown": foreign}
        wrong = [f"{kind} {choices(sorted(columns))}" for kind, columns in kinds.items() if columns]
        if wrong:
            raise UserError(
                f"{self.path} has other columns: it {' and '.join(wrong)}; --overwrite replaces it"
            )

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished row and write the table.

        Raises
        ------
        UserError
            If the table that was found has other columns, or another process has locked the folder.
        """
        if self.columns is not None:
            self._check_columns(row.keys() - self.columns, self.columns - row.keys())
        self.rows.append(dict(row))
        if rank_and_world()[0] == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.path.parent)
            if len(self.rows) == 1:
                # rows of other options must never lie beside these
                self.path.unlink(missing_ok=True)
                write_json({"options": self.options}, self.path.with_suffix(".json"))
            write_table(pd.DataFrame(self.rows), self.path)


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def check_folder(folder: Path) -> Lock | None:
    """Refuse a folder for results that cannot be made or written, before hours of work.

    Returns
    -------
    The lock of the folder; see `locked`.

    Raises
    ------
    UserError
        Also for a folder that another process has locked, and for a path that begins with ~, which
        only shells expand.
    """
    if str(folder).startswith("~"):
        raise UserError(f"--out {folder}: ~ stands for no folder here; write the whole path")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        # root's permissions tell nothing
        with tempfile.TemporaryDirectory(dir=there, prefix=".bvit-interp-"):
            pass
    except OSError as error:
        raise UserError(
            f"--out {folder}: {there} is not a folder that can be written to"
        ) from error
    return locked(folder)
