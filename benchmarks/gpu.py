"""Run the jobs that need a GPU within a time limit, or copy their results into the repository.

    python benchmarks/gpu.py [--seconds 570] [--out runs/gpu] [--data DIR] [--only JOB ...]
        [--skip JOB ...]
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --dry-run
    python benchmarks/gpu.py collect FOLDER [--overwrite]

The queue is `benchmarks/gpu.yaml`, the most important jobs first. The output folder has at most 8
files of at most 16 MiB and is valid after every job. Jobs work in `runs/gpu-work/JOB`. The next run
continues an unfinished training there and does not repeat a finished job. Besides pyyaml only the
packages that the jobs need must be installed. Exit code: 0, 1 if a job failed or was killed, 2 if
the options or the queue are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import gpu_queue
from gpu_queue import QUEUE, ROOT, Job, Launch, Queue, Settings
from gpu_results import GpuError, collect

OUT, WORK, DRY = Path("runs/gpu"), Path("runs/gpu-work"), Path("runs/gpu-dry")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in the options in one line."""

    def error(self, message: str) -> NoReturn:
        raise GpuError(f"{message} (--help lists the options)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _collect(given[1:]) if given[:1] == ["collect"] else _run(given)
    except (GpuError, OSError) as error:
        print(f"gpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu: interrupted; what was packed is kept", file=sys.stderr)
        return 130


def _run(given: list[str]) -> int:
    parser = Parser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=570.0, help="time limit of the run (default 570)"
    )
    parser.add_argument("--out", type=Path, help="output folder (default runs/gpu)")
    parser.add_argument(
        "--data", type=Path, help="folder of data sets (default $BVIT_INTERP_DATA or data)"
    )
    parser.add_argument("--work", type=Path, help=f"folder of the jobs (default {WORK})")
    parser.add_argument("--device", help="device of the jobs (default cuda; cpu in a dry run)")
    parser.add_argument(
        "--only", nargs="+", metavar="JOB", help="run these jobs, even if their results exist"
    )
    parser.add_argument("--skip", nargs="+", metavar="JOB", default=[], help="leave these jobs out")
    parser.add_argument(
        "--weights", choices=["fp16", "fp32"], default="fp16", help="how weights are packed"
    )
    parser.add_argument("--queue", type=Path, default=QUEUE, help="queue file")
    parser.add_argument("--list", action="store_true", help="list the jobs and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="run all jobs at tiny sizes on tiny random data"
    )
    options = parser.parse_args(given)
    jobs = _chosen(gpu_queue.read(options.queue), options.only, options.skip)
    if options.list:
        print(
            "\n".join(
                f"{job.name:<24}{job.seconds:>6.0f} s  {' '.join(job.command)}" for job in jobs
            )
        )
        return 0
    if options.seconds <= 0:
        raise GpuError(f"--seconds must be above 0, got {options.seconds:g}")
    out, work = (DRY / "out", DRY / "work") if options.dry_run else (OUT, WORK)
    work = (options.work or work).resolve()
    data = options.data or Path(os.environ.get("BVIT_INTERP_DATA") or "data")
    settings = Settings(
        seconds=options.seconds,
        out=(options.out or out).resolve(),
        work=work,
        data=work / "tiny-data" if options.dry_run else data.resolve(),
        device=options.device or ("cpu" if options.dry_run else "cuda"),
        dry=options.dry_run,
        again=options.only is not None or options.dry_run,
        halve=options.weights == "fp16",
    )
    if options.dry_run:
        # so that all jobs run
        jobs = [replace(job, seconds=min(job.seconds, 5.0), limit=120.0) for job in jobs]
    with _starter(settings) as start:
        rows = Queue(jobs, settings, start).run()
    print(f"\n{gpu_queue.table(rows)}\n\nwrote {settings.out}")
    return int(any(row.state in ("failed", "killed") for row in rows))


@contextlib.contextmanager
def _starter(settings: Settings) -> Iterator[Launch]:
    """The function that starts jobs; a dry run writes tiny data first."""
    if not settings.dry:
        yield gpu_queue.launch
        return
    from gpu_dry import Forks, write_tiny_data

    write_tiny_data(settings.data)
    forks = Forks()
    try:
        yield forks
    finally:
        forks.close()


def _chosen(jobs: list[Job], only: list[str] | None, skip: list[str]) -> list[Job]:
    names = [job.name for job in jobs]
    if unknown := [name for name in (*(only or ()), *skip) if name not in names]:
        raise GpuError(f"no job {unknown[0]!r}; jobs: {', '.join(names)}")
    return [job for job in jobs if (only is None or job.name in only) and job.name not in skip]


def _collect(given: list[str]) -> int:
    parser = Parser(prog="gpu.py collect", description="Copy a run's results into the repository.")
    parser.add_argument("folder", type=Path, help="output folder of a run")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files in the repository that differ"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--queue", type=Path, default=QUEUE, help="queue file")
    options = parser.parse_args(given)
    mappings = {job.name: job.collect for job in gpu_queue.read(options.queue)}
    found, placed = collect(
        options.folder, options.root, options.root / WORK, mappings, overwrite=options.overwrite
    )
    for file in placed:
        stored = found.summary["files"][file.name].get("stored", "")
        print(f"{file.how:<9}{file.path.relative_to(options.root)}  {stored}".rstrip())
    for name, why in found.summary.get("left_out", {}).items():
        print(f"left out {name}: {why}")
    for job in found.summary["jobs"]:
        print(
            f"{job['name']:<24}{job['state']:<9}{job['seconds']:>8.0f} s, {job['estimate']:.0f}"
            " s estimated"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
