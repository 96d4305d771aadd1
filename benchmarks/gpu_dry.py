"""Dry run of the GPU queue: tiny random data sets, and jobs forked from one process.

Each job imports torch, timm and the package, which takes seconds. In a dry run one process imports
them once, and every job that is a Python command is a fork of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import select
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WARM = (
    "torch",
    "timm",
    "torchvision",
    "pandas",
    "torchmetrics.classification",
    "tyro",
    "pyarrow.parquet",
    "pytest",
    "bvit_interp.cli.run.train",
    "bvit_interp.training.loop.supervised",
    "bvit_interp.analyses",
)


class Forked:
    """A job that is a fork of the server process."""

    def __init__(self, server: subprocess.Popen[str], pid: int) -> None:
        self.server, self.pid, self.code = server, pid, None

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        if self.code is None and select.select([self.server.stdout], [], [], 0)[0]:
            line = self.server.stdout.readline()
            self.code = json.loads(line)["code"] if line else 1
        return self.code


class Forks:
    """Start Python jobs as forks of one server process, and other commands as usual."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def __call__(self, words: Sequence[str], environment: dict[str, str], log: Path) -> Any:
        from gpu_queue import ROOT, launch, own_group

        if words[0] != sys.executable:
            return launch(words, environment, log)
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                preexec_fn=own_group,
            )
        self.server.stdin.write(json.dumps({"words": list(words[1:]), "log": str(log)}) + "\n")
        self.server.stdin.flush()
        return Forked(self.server, json.loads(self.server.stdout.readline())["pid"])

    def close(self) -> None:
        """End the server process."""
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server.stdout.close()


def serve() -> None:
    """Import the slow packages, then fork one job per line of the input."""
    for name in WARM:
        with contextlib.suppress(ImportError):
            __import__(name)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_run(asked["words"], asked["log"]))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def _run(words: list[str], log: str) -> int:
    """Run a Python command in this process and return its exit code."""
    from gpu_queue import own_group

    own_group()
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(os.devnull if stream == 0 else log, flags, 0o644), stream)
    os.dup2(1, 2)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = words[:1] + words[2:]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        if stopped.code is not None and not isinstance(stopped.code, int):
            print(stopped.code, file=sys.stderr)
            return 1
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


CLASSES = {  # image column, side and class names
    "cifar10": (
        "img",
        32,
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    ),
    "imagenette": (
        "image",
        224,
        [
            f"n{number:08d}"
            for number in (
                1440764,
                2102040,
                2979186,
                3000684,
                3028079,
                3394916,
                3417042,
                3425413,
                3445777,
                3888257,
            )
        ],
    ),
}


def write_tiny_data(folder: Path, count: int = 40) -> None:
    """Write random images as `cifar10` and `imagenette`, as Hugging Face parquet files."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random = np.random.default_rng(0)
    for name, (column, size, classes) in CLASSES.items():
        features = {"label": {"names": classes, "_type": "ClassLabel"}, column: {"_type": "Image"}}
        about = {"huggingface": json.dumps({"info": {"features": features}})}
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            images = []
            for i in range(count):
                coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                stored = io.BytesIO()
                Image.fromarray(coarse).resize((size, size)).save(stored, format="JPEG")
                images.append({"bytes": stored.getvalue(), "path": f"{split}-{i}.jpg"})
            rows = pa.table(
                {column: images, "label": pa.array([i % 10 for i in range(count)], pa.int64())}
            )
            pq.write_table(rows.replace_schema_metadata(about), folder / name / f"{split}.parquet")


if __name__ == "__main__":
    serve()
