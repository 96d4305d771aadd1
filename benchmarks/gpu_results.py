"""Output of a run of the GPU queue: a tar in shards, a log and a summary, valid after every job.

The tar only grows. `summary.json` is replaced in one move. It has the number of valid bytes of the
tar and their checksum, so a run that is killed at any moment keeps the results of earlier jobs.
`collect` joins the shards, checks them and copies each file to its destination.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

MIB = 2**20
SHARD = 63 * MIB // 4  # of the 16 MiB that a file may have
TOTAL = 4 * SHARD  # of 64 MiB in all; the rest is for log and summary
MOST_LOG = MIB // 4
LOG, SUMMARY = "log.txt", "summary.json"
VERSION = 1
STATE, RAW, AVERAGED = "state.pt", "model.safetensors", "ema.safetensors"
SMALL, WEIGHTS, STATES = 1, 2, 3  # packed after each job, after all jobs, and last


class GpuError(Exception):
    """An error of the user, in one line."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"part-{number:02d}.tar"


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one move."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_bytes(content)
    beside.replace(path)


def tier(path: Path) -> int:
    """When a file is packed: states last, raw weights late if there are averaged ones too."""
    if path.name == STATE:
        return STATES
    return WEIGHTS if path.name == RAW and (path.parent / AVERAGED).is_file() else SMALL


class Package:
    """The output folder of a run.

    Parameters
    ----------
    folder : created if missing. Files of an earlier run are removed; other files are an error.
    shard, total : most bytes of a shard, and of all shards together.
    halve : store float32 weights as float16.
    """

    def __init__(
        self, folder: Path, *, shard: int = SHARD, total: int = TOTAL, halve: bool = True
    ) -> None:
        self.folder, self.shard, self.total, self.halve = folder, shard, total, halve
        self.size, self.sum = 0, hashlib.sha256()
        self.files: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        own = re.compile(r"(part-\d\d\.tar|log\.txt|summary\.json)(\.partial)?")
        if foreign := sorted(
            path.name for path in folder.iterdir() if not own.fullmatch(path.name)
        ):
            raise GpuError(f"{folder} holds other things ({foreign[0]}): give another --out")
        (folder / SUMMARY).unlink(missing_ok=True)  # first, so that the rest is no valid output
        for path in folder.iterdir():
            path.unlink()

    def add(self, name: str, path: Path) -> bool:
        """Append a file as `name`, or record that it is left out if there is no room."""
        content, is_halved = path.read_bytes(), False
        if self.halve and path.suffix == ".safetensors":
            content, is_halved = halved(content)
        if path.suffix == ".xml":
            content = without_machine(content)
        return self.add_bytes(name, content, is_halved)

    def add_bytes(self, name: str, content: bytes, is_halved: bool = False) -> bool:
        """Append `content` as the file `name`; see `add`."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        member = info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
        if self.size + len(member) > self.total:
            self.left_out[name] = f"no room for {len(content)} bytes"
            return False
        self._append(member)
        self.left_out.pop(name, None)
        self.files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if is_halved:
            self.files[name]["stored"] = "float16, was float32"
        return True

    def commit(self, summary: dict[str, Any], log: str) -> None:
        """Make the added files valid, by a new summary."""
        count = -(-self.size // self.shard)
        content = {
            "version": VERSION,
            "bytes": self.size,
            "sha256": self.sum.hexdigest(),
            "shards": [shard_name(i) for i in range(count)],
            **summary,
            "left_out": self.left_out,
            "files": self.files,
        }
        write_whole(self.folder / LOG, log.encode()[-MOST_LOG:])
        write_whole(self.folder / SUMMARY, (json.dumps(content, indent=1) + "\n").encode())

    def _append(self, member: bytes) -> None:
        """Write after the valid bytes, over the rest of an interrupted write."""
        size, rest = self.size, member
        while rest:
            number, used = divmod(size, self.shard)
            part, rest = rest[: self.shard - used], rest[self.shard - used :]
            path = self.folder / shard_name(number)
            with path.open("r+b" if path.exists() else "wb") as stream:
                stream.seek(used)
                stream.truncate()
                stream.write(part)
            size += len(part)
        self.sum.update(member)
        self.size = size


def halved(content: bytes) -> tuple[bytes, bool]:
    """A safetensors file with its float32 tensors as float16, and whether it was changed.

    It is not changed without numpy, without float32 tensors, or if a weight is outside the range
    of float16.
    """
    try:
        import numpy as np
    except ImportError:
        return content, False
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
    if not any(entry["dtype"] == "F32" for entry in header.values()):
        return content, False
    stored, parts, at = {}, [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        part, dtype = data[slice(*entry["data_offsets"])], entry["dtype"]
        if dtype == "F32":
            full = np.frombuffer(part, "<f4")
            with np.errstate(over="ignore"):
                half = full.astype("<f2")
            if (np.isinf(half) & ~np.isinf(full)).any():
                return content, False
            part, dtype = half.tobytes(), "F16"
        stored[name] = {
            "dtype": dtype,
            "shape": entry["shape"],
            "data_offsets": [at, at + len(part)],
        }
        parts.append(part)
        at += len(part)
    head = json.dumps(about | stored, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts]), True


@dataclass(frozen=True)
class Found:
    """The content of a checked folder: its summary, and its files by name."""

    summary: dict[str, Any]
    files: dict[str, bytes]


def without_machine(report: bytes, root: Path = ROOT) -> bytes:
    """A test report without the path of the repository and the name of the machine."""
    report = report.replace(f"{root}/".encode(), b"")
    return re.sub(rb' hostname="[^"]*"', b"", report)


def read(folder: Path) -> Found:
    """Read and check the output folder of a run.

    Raises
    ------
    GpuError
        If a file is missing or changed, or a name leads out of its folder.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        size, wanted, shards = summary["bytes"], summary["sha256"], summary["shards"]
        version, listed = summary["version"], summary["files"]
    except FileNotFoundError:
        raise GpuError(f"{folder} holds no {SUMMARY}: it is not the output of `make gpu`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise GpuError(f"{folder / SUMMARY} cannot be read ({error})") from None
    if version != VERSION:
        raise GpuError(f"{folder / SUMMARY} is of version {version}, this reads {VERSION}")
    joined = b""
    for number, name in enumerate(shards):
        if name != shard_name(number):
            raise GpuError(f"{folder / SUMMARY} names a shard {name!r}")
        if not (folder / name).is_file():
            raise GpuError(f"{folder / name} is missing")
        joined += (folder / name).read_bytes()
    if len(joined) < size or hashlib.sha256(joined[:size]).hexdigest() != wanted:
        raise GpuError(f"the shards in {folder} are not those that {SUMMARY} describes")
    return Found(summary, _members(joined[:size], listed, folder))


def _members(joined: bytes, listed: dict[str, Any], folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if not joined:
        return files
    try:
        with tarfile.open(fileobj=io.BytesIO(joined), mode="r:") as tar:
            for member in tar:
                if not member.isreg() or not is_safe(member.name):
                    raise GpuError(
                        f"{folder} holds {member.name!r}, which is no file below its folder"
                    )
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                known = listed.get(member.name, {})
                if known.get("sha256") != hashlib.sha256(content).hexdigest():
                    raise GpuError(
                        f"{member.name} in {folder} is not the file that {SUMMARY} describes"
                    )
                files[member.name] = content
    except tarfile.TarError as error:
        raise GpuError(f"the shards in {folder} are no tar ({error})") from None
    return files


def is_safe(name: str) -> bool:
    """Whether a path in the tar stays inside its folder."""
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and "\0" not in name and not path.is_absolute()
    return plain and not {"..", ".git"} & set(path.parts)


def destination(name: str, mapping: dict[str, str]) -> str | None:
    """Destination of a job's file, by the longest entry of its `collect` mapping that fits."""
    fits = [
        source
        for source in mapping
        if name == source or name.startswith(f"{source}/") or source == "."
    ]
    if not fits or PurePosixPath(name).name == STATE:
        return None
    source = max(fits, key=len)
    rest = name if source == "." else name.removeprefix(source).lstrip("/")
    return f"{mapping[source]}/{rest}" if rest else mapping[source]


@dataclass(frozen=True)
class Placed:
    """One file of `collect`, and whether it was new, same or replaced."""

    name: str
    path: Path
    how: str


def collect(
    folder: Path,
    root: Path,
    work: Path,
    mappings: dict[str, dict[str, str]],
    *,
    overwrite: bool = False,
) -> tuple[Found, list[Placed]]:
    """Copy the files of a run to their destinations; if one is refused, nothing is written.

    Parameters
    ----------
    folder : output folder of a run.
    root : the repository.
    work : folder of the jobs, inside `root`. Files of unfinished or failed jobs go there, so that
        the queue can continue them. Existing files there are replaced.
    mappings : job -> its `collect` mapping, for the files of finished jobs.
    overwrite : replace files in the repository that differ.

    Raises
    ------
    GpuError
        As for `read`; also if a job is unknown, or a file exists and differs.
    """
    found = read(folder)
    finished = {job["name"] for job in found.summary["jobs"] if job["state"] in ("done", "kept")}
    planned, refused = [], []
    for name, content in found.files.items():
        job, _, inner = name.partition("/")
        if job not in mappings:
            raise GpuError(f"{folder} holds {name}, and the queue has no job {job!r}")
        in_place = (
            destination(inner.removeprefix("out/"), mappings[job])
            if inner.startswith("out/")
            else None
        )
        is_placed = job in finished and in_place is not None
        path = root / str(in_place) if is_placed else work / job / inner
        if not path.resolve().is_relative_to(root.resolve()):
            raise GpuError(f"{path} lies outside of {root}")
        if path.is_dir():
            raise GpuError(f"{path} is a folder, and {name} a file")
        how = "new" if not path.exists() else "same" if path.read_bytes() == content else "replaced"
        if how == "replaced" and is_placed and not overwrite:
            refused.append(path)
        planned.append((Placed(name, path, how), content))
    if refused:
        kind = "tracked by git" if _is_tracked(refused[0], root) else "there already"
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise GpuError(f"{refused[0]} is {kind} and differs{more}: give --overwrite to replace it")
    for placed, content in planned:
        if placed.how != "same":
            placed.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(placed.path, content)
    return found, [placed for placed, _ in planned]


def _is_tracked(path: Path, root: Path) -> bool:
    asked = ["git", "-C", str(root), "ls-files", "--error-unmatch", str(path.resolve())]
    try:
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
