"""The GPU queue: its jobs, run one after the other within a time limit.

A job starts if its estimate fits in the time left. It may run for twice its estimate, or for
`limit` seconds, but not beyond the time limit of the queue. Then it is interrupted, as by Ctrl-C,
and killed after a grace period. Its files are kept.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import yaml
from gpu_results import SMALL, STATES, WEIGHTS, GpuError, Package, is_safe, tier, write_whole

ROOT = Path(__file__).resolve().parents[1]
QUEUE = Path(__file__).with_name("gpu.yaml")
GRACE = 10.0  # seconds between interrupt and kill
PACKING = 8.0  # seconds reserved for the last packing
STARTING = 15.0  # seconds before a training starts to count its time
TAIL = 12  # lines of a job's log in log.txt
REFRESHED = 15.0  # seconds between two copies of a running job's log
FINISHED = ("done", "kept")
STATES_OF_A_JOB = {
    "done": "finished",
    "kept": "finished in an earlier run, packed again",
    "there": "skipped, its results are in the repository",
    "lacks": "skipped, a file or folder that it needs is missing",
    "late": "not started, its estimate does not fit in the time left",
    "stopped": "ran out of time; it goes on where it stopped",
    "killed": "did not stop when interrupted",
    "failed": "ended with an error",
    "running": "was running when the queue itself was killed",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One entry of the queue. Commands and paths may hold placeholders, see `placeholders`."""

    name: str
    """Letters, digits, dots, dashes and underscores."""
    command: tuple[str, ...]
    """Program and arguments."""
    seconds: float
    """Estimated time on one H100."""
    leaves: tuple[str, ...]
    """Glob patterns of its results in its output folder."""
    limit: float | None = None
    """Maximum time in seconds; by default twice the estimate."""
    needs: tuple[str, ...] = ()
    """Paths that must exist; otherwise it is skipped."""
    done: tuple[str, ...] = ()
    """Paths in the repository that exist if its results are there."""
    collect: dict[str, str] = field(default_factory=dict)
    """File or folder of its output -> path in the repository."""
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Its own recipes, name -> content; `{recipes}` gives their files."""
    dry: tuple[str, ...] = ()
    """Arguments that a dry run appends."""


def read(path: Path) -> list[Job]:
    """Read the queue from a YAML file.

    Raises
    ------
    GpuError
        If the file is not a queue.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GpuError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    entries = content.get("jobs") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise GpuError(f"{path}: not a queue (a mapping with a list `jobs`)")
    jobs = [_job(entry, path) for entry in entries]
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GpuError(f"{path}: two jobs are named {twice[0]}")
    return jobs


def _job(entry: Any, path: Path) -> Job:
    if not isinstance(entry, dict):
        raise GpuError(f"{path}: a job is a mapping, got {entry!r}")
    where = f"{path}: job {entry.get('name', '(without a name)')}"
    known = {f.name for f in fields(Job)}
    if unknown := sorted({str(key) for key in entry} - known):
        raise GpuError(
            f"{where}: unknown setting {unknown[0]}; settings: {', '.join(sorted(known))}"
        )
    required = [
        f.name for f in fields(Job) if f.default is MISSING and f.default_factory is MISSING
    ]
    if missing := [name for name in required if not entry.get(name)]:
        raise GpuError(f"{where}: {missing[0]} must be given")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(entry["name"])):
        raise GpuError(f"{where}: a name has letters, digits, dots, dashes and underscores")
    for name in ("seconds", "limit"):
        value = entry.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise GpuError(f"{where}: {name} must be a number above 0, got {value!r}")
    listed = {
        name: _words(entry[name], f"{where}: {name}")
        for name in ("command", "leaves", "needs", "done", "dry")
        if name in entry
    }
    job = Job(**{**entry, "name": str(entry["name"]), **listed})
    for value in (*job.leaves, *job.done, *job.collect, *job.collect.values()):
        if not is_safe(value):
            raise GpuError(f"{where}: {value!r} is no path below its folder")
    for word in (*job.command, *job.dry, *job.needs):
        for _, name, _, _ in string.Formatter().parse(word):
            if name is not None and name not in PLACEHOLDERS:
                raise GpuError(
                    f"{where}: no placeholder {{{name}}}; there are: {', '.join(PLACEHOLDERS)}"
                )
    return job


def _words(value: Any, where: str) -> tuple[str, ...]:
    """The words of a list or of a string."""
    words = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(words, list) or not all(
        isinstance(word, str | int | float) for word in words
    ):
        raise GpuError(f"{where} must be a list of words or a string, got {value!r}")
    return tuple(str(word) for word in words)


PLACEHOLDERS = {
    "python": "this Python",
    "cli": "several words: the package's command line under this Python",
    "data": "folder of the data sets",
    "out": "the job's output folder",
    "device": "cuda, or cpu in a dry run",
    "minutes": "time budget of a training, in minutes",
    "root": "the repository",
    "work": "folder of all jobs; JOB/out is a job's output folder",
    "recipes": "several words: the files of the job's own recipes",
    "gpu_tests": "several words: the test files with tests marked gpu",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run of the queue."""

    seconds: float = 570.0
    """Time limit of the run."""
    out: Path
    """Output folder."""
    work: Path
    """Folder of the jobs: WORK/NAME/out, job.log, job.json."""
    data: Path
    """Folder of the data sets."""
    device: str = "cuda"
    """Device of the jobs."""
    dry: bool = False
    """Append each job's `dry` arguments."""
    again: bool = False
    """Also run jobs whose results are in the repository."""
    halve: bool = True
    """Store float32 weights as float16."""
    grace: float = GRACE
    """Seconds between interrupt and kill."""
    packing: float = PACKING
    """Seconds reserved for the last packing."""


def command(job: Job, settings: Settings, budget: float) -> list[str]:
    """The words of the command, with values for the placeholders."""
    several = {
        "cli": [sys.executable, "-m", "bvit_interp.cli"],
        "recipes": [str(settings.work / job.name / f"{name}.yaml") for name in job.recipes],
        "gpu_tests": gpu_tests(ROOT / "tests"),
    }
    words: list[str] = []
    for word in (*job.command, *(job.dry if settings.dry else ())):
        inner = word[1:-1] if word.startswith("{") and word.endswith("}") else ""
        words += several[inner] if inner in several else [_filled(word, job, settings, budget)]
    return words


def _filled(word: str, job: Job, settings: Settings, budget: float) -> str:
    minutes = max(budget - STARTING, 0.5 * budget) / 60
    return word.format(
        python=sys.executable,
        data=settings.data,
        out=settings.work / job.name / "out",
        device=settings.device,
        minutes=f"{minutes:.2f}",
        root=ROOT,
        work=settings.work,
    )


def gpu_tests(folder: Path) -> list[str]:
    """The test files with tests marked gpu."""
    found = (path for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text())
    return sorted(str(path) for path in found if path.name != "test_gpu_queue.py")


class Process(Protocol):
    """A running job, with the interface of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""


Launch = Callable[[Sequence[str], dict[str, str], Path], Process]
"""Words, environment and log file -> a process in its own process group."""


def launch(words: Sequence[str], environment: dict[str, str], log: Path) -> Process:
    """Start a process that ends when this one is killed."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=own_group,
        )


_LIBC = ctypes.CDLL(None)


def own_group() -> None:
    """Make this process the leader of a group that is killed when its parent dies (Linux).

    A shell starts what runs in the background deaf to SIGINT; a job must hear it.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class Row:
    """State of a job in a run of the queue."""

    job: Job
    state: str
    seconds: float = 0.0
    code: int | None = None
    why: str = ""

    def record(self) -> dict[str, Any]:
        """The row for `summary.json` and `job.json`."""
        return {
            "name": self.job.name,
            "state": self.state,
            "seconds": round(self.seconds, 1),
            "estimate": self.job.seconds,
            "code": self.code,
            "why": self.why,
        }


class Queue:
    """One run of the queue."""

    def __init__(self, jobs: Sequence[Job], settings: Settings, start: Launch = launch) -> None:
        self.jobs, self.settings, self.start = jobs, settings, start
        self.began = time.monotonic()
        self.rows: list[Row] = []
        self.package = Package(settings.out, halve=settings.halve)
        self.about = {"machine": machine(), "limit": settings.seconds, "dry": settings.dry}

    def run(self) -> list[Row]:
        """Run all jobs that fit, pack the results of each, and last the files that still fit."""
        with _interrupted_by_term():
            try:
                for job in self.jobs:
                    self.rows.append(Row(job, "running"))
                    self._one(self.rows[-1])
                    self._say(self.rows[-1])
            finally:
                self._pack_late()
        return self.rows

    def left(self) -> float:
        """Seconds that a job may take if it starts now."""
        settings = self.settings
        passed = time.monotonic() - self.began
        return settings.seconds - passed - settings.packing - settings.grace

    def _one(self, row: Row) -> None:
        job, settings = row.job, self.settings
        home, before = settings.work / job.name, _previous(settings.work / job.name)
        lacking = [path for path in job.needs if not Path(_filled(path, job, settings, 0)).exists()]
        is_kept = (
            before.get("state") == "done"
            and before.get("key") == key(job)
            and (home / "out").is_dir()
        )
        if is_kept and not settings.again:
            row.state, row.seconds = "kept", float(before.get("seconds", 0.0))
        elif job.done and not settings.again and all((ROOT / path).exists() for path in job.done):
            row.state = "there"
        elif lacking and not settings.dry:
            row.state, row.why = "lacks", _filled(lacking[0], job, settings, 0)
        elif job.seconds > self.left():
            row.state, row.why = "late", f"{max(self.left(), 0):.0f} s left"
        else:
            self._work(row, home)
        if row.state not in ("there", "lacks", "late"):
            self._pack(row)
        self._commit()

    def _work(self, row: Row, home: Path) -> None:
        """Run a job until it ends or its time is over."""
        job, log = row.job, home / "job.log"
        out = home / "out"
        if self.settings.dry:
            shutil.rmtree(home, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        for old in (log, home / "job.json"):
            old.unlink(missing_ok=True)
        for name, recipe in job.recipes.items():
            (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        budget = min(self.left(), job.limit or 2 * job.seconds)
        words = command(job, self.settings, budget)
        self._commit()
        print(
            f"{job.name}: started, {job.seconds:.0f} s estimated, {budget:.0f} s at most",
            flush=True,
        )
        began = time.monotonic()
        try:
            process = self.start(words, _environment(self.settings), log)
        except OSError as error:
            row.state, row.why = "failed", str(error)
            return
        try:
            interrupted = self._wait(process, began, budget)
        except BaseException:  # Ctrl-C, or SIGTERM from the machine
            row.code, row.seconds = self._end(process), time.monotonic() - began
            row.state, row.why = "stopped", "interrupted by hand"
            _remember(row, home)
            self._pack(row)
            raise
        row.code = self._end(process)
        row.seconds = time.monotonic() - began
        row.state, row.why = self._outcome(row, interrupted, out)
        _remember(row, home)

    def _wait(self, process: Process, began: float, budget: float) -> bool:
        """Wait until a job ends; True if its time was over first."""
        refreshed = began
        while process.poll() is None:
            now = time.monotonic()
            if now - began > budget:
                return True
            if now - refreshed > REFRESHED:
                self._commit()
                refreshed = now
            time.sleep(0.05)
        return False

    def _end(self, process: Process) -> int | None:
        """Interrupt a running job, kill it and its children after a grace period; its exit code."""
        if process.poll() is None:
            _signal(process, signal.SIGINT, group=False)
            patience = time.monotonic() + self.settings.grace
            while process.poll() is None and time.monotonic() < patience:
                time.sleep(0.05)
        _signal(process, signal.SIGKILL, group=True)
        while process.poll() is None:
            time.sleep(0.01)
        return process.poll()

    def _outcome(self, row: Row, interrupted: bool, out: Path) -> tuple[str, str]:
        if interrupted:
            killed = row.code == -signal.SIGKILL
            return ("killed" if killed else "stopped"), f"after {row.seconds:.0f} s"
        if row.code:
            return "failed", f"exit code {row.code}"
        behind = unfinished(out)
        return ("stopped", behind[0]) if behind else ("done", "")

    def _pack(self, row: Row) -> None:
        """Add a job's small files."""
        home = self.settings.work / row.job.name
        for name in ("job.json", "job.log"):
            if (home / name).is_file():
                content = (home / name).read_bytes()[-(2**20) :]
                self.package.add_bytes(f"{row.job.name}/{name}", content)
        self._add(row, SMALL)
        self._commit()

    def _pack_late(self) -> None:
        """Add raw weights, then states of unfinished trainings, while there is room."""
        for level in (WEIGHTS, STATES):
            for row in self.rows:
                if row.state not in ("there", "lacks", "late"):
                    self._add(row, level)
            self._commit()

    def _add(self, row: Row, level: int) -> None:
        out = self.settings.work / row.job.name / "out"
        for path in left_files(row.job, out):
            own = tier(path)
            name = f"{row.job.name}/out/{path.relative_to(out).as_posix()}"
            if own == STATES and row.state in FINISHED:
                continue  # not needed any more
            if own == level and name not in self.package.files:
                self.package.add(name, path)
            elif own > level:
                self.package.left_out.setdefault(name, "packed last, if there is room")

    def _commit(self) -> None:
        passed = round(time.monotonic() - self.began, 1)
        jobs = [row.record() for row in self.rows]
        logs = [self._log_of(row) for row in self.rows]
        self.package.commit(
            {**self.about, "seconds": passed, "jobs": jobs},
            "\n".join([*logs, table(self.rows), ""]),
        )

    def _log_of(self, row: Row) -> str:
        lines = last_lines(self.settings.work / row.job.name / "job.log", TAIL)
        is_run = row.state not in ("there", "lacks", "late")
        return "\n".join([f"== {row.job.name}: {row.state} {row.why}", *(lines if is_run else [])])

    @staticmethod
    def _say(row: Row) -> None:
        print(f"{row.job.name}: {row.state} {row.why} ({row.seconds:.0f} s)", flush=True)


def key(job: Job) -> str:
    """Hash of the job's command and recipes."""
    return hashlib.sha256(repr((job.command, job.recipes)).encode()).hexdigest()[:16]


def left_files(job: Job, out: Path) -> list[Path]:
    """The result files of a job, in the order of its patterns."""
    found = (path for pattern in job.leaves for path in sorted(out.glob(pattern)))
    return list(dict.fromkeys(path for path in found if path.is_file() and not path.is_symlink()))


def unfinished(out: Path) -> list[str]:
    """Missing epochs in the folders of trainings (those with a history or a state)."""
    behind = []
    for folder in sorted(
        {path.parent for name in ("history.csv", "state.pt") for path in out.rglob(name)}
    ):
        try:
            wanted = int(
                json.loads((folder / "config.json").read_text())["training"]["recipe"]["epochs"]
            )
            with (folder / "history.csv").open() as stream:
                reached = [int(float(row["epoch"])) for row in csv.DictReader(stream)][-1]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            behind.append(f"{folder.name}: no epoch was scored")
            continue
        if reached < wanted:
            behind.append(f"{folder.name}: epoch {reached} of {wanted}")
    return behind


def table(rows: Sequence[Row]) -> str:
    """One line per job: state, seconds, estimate."""
    lines = [f"{'job':<24}{'state':<9}{'seconds':>8}{'estimate':>9}  "]
    lines += [
        f"{r.job.name:<24}{r.state:<9}{r.seconds:>8.0f}{r.job.seconds:>9.0f}  {r.why}" for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty; each state of a progress bar is a line."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(path.stat().st_size - 8192, 0))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip()[:300] for line in re.split(r"[\r\n]+", text) if line.strip()][-count:]


def machine() -> dict[str, str]:
    """Version of Python, number of CPUs, and the GPU if there is one."""
    known = {"python": sys.version.split()[0], "cpus": str(os.cpu_count())}
    if shutil.which("nvidia-smi"):
        asked = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            known["card"] = subprocess.run(
                asked, capture_output=True, text=True, timeout=20
            ).stdout.strip()
    return known


def _environment(settings: Settings) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "BVIT_INTERP_DATA": str(settings.data),
    }


def _previous(home: Path) -> dict[str, Any]:
    """The content of `job.json` from an earlier run of a job."""
    try:
        content = json.loads((home / "job.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(row: Row, home: Path) -> None:
    write_whole(
        home / "job.json", (json.dumps(row.record() | {"key": key(row.job)}) + "\n").encode()
    )


def _signal(process: Process, number: int, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(process.pid, number)


@contextlib.contextmanager
def _interrupted_by_term() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C: stop the running job and pack its files."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
