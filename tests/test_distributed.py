"""Two processes give the tables of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import OF_THE_MACHINE, OPTIONS, as_arguments

from bvit_interp.analyses import ANALYSES
from bvit_interp.models import masks
from bvit_interp.models.checkpoint import save
from bvit_interp.models.exits import FILE as EXITS
from bvit_interp.models.exits import Exits

TIMED = {"cost"}  # refuses several processes, which would disturb each other
GROUPS = 4  # of all other questions: a process starts once for all of a group
SHARED = [word for word in ANALYSES if word not in TIMED]
# (command, images); with one image the second process has none
FURTHER = {
    "one image": [
        ("pointing-game", 1),
        ("rank-sweep", 1),
        ("dynamics", 1),
        ("attention", 1),
        ("evaluate", 1),
        ("pathways", 1),
        ("features --neurons 5 --iterations 1", 1),
    ],
    "few images": [
        ("ablation --groups 2 --n-ablated 7", 7),
        ("ablation --groups 0 --methods mean zero", 1),
        ("lens --n-fit 24 --iterations 5", 1),
        ("stability --n-jacobian 3 --steps 13 --jacobian-steps 1 --leading 2 --iterations 3", 7),
        ("circuits --methods gradient learned --epochs 1 --n-fit 16 --fractions 0.5", 1),
    ],
}


def quick(word, exits):
    """The command of a question with its small options, and the number of images."""
    options = {"limit": 41, **OPTIONS[word]}
    if word == "early_exit":
        options["exits"] = (exits,)
    limit = options.pop("limit")
    return " ".join([word.replace("_", "-"), *as_arguments(options)]), limit


@pytest.fixture
def ckpt(tiny, tmp_path):
    """A checkpoint with masks of its steps: FOLDER, or FOLDER@masked."""
    folder = save(tiny, tmp_path / "tiny")
    generator = torch.Generator().manual_seed(0)
    of = {
        name: torch.rand(mask.shape, generator=generator) < 0.6
        for name, mask in masks.full(tiny).items()
    }
    masks.Masks(of).save(folder / masks.FILE, tiny)
    Exits((3, 6), tiny.embed_dim, tiny.num_classes).save(folder / EXITS, tiny, {})
    return str(folder)


def arguments(word, limit, ckpt, out):
    ckpt = f"{ckpt}@masked" if word.startswith("pathways") else ckpt
    return [
        *word.split(),
        "--ckpt",
        ckpt,
        "--limit",
        str(limit),
        "--batch-size",
        "8",
        "--out",
        str(out),
    ]


def run(count, commands):
    """Run the commands in `count` processes that find each other; never in the tests' own, whose
    state others share."""
    with ExitStack() as stack:  # held until all are found, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in commands]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    listed = json.dumps(list(zip(ports, commands, strict=True)))
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("commands.py"), listed],
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error[-2000:]


def same(word, one, two):
    one, two = (pd.read_csv(out / f"{word.split()[0].replace('-', '_')}.csv") for out in (one, two))
    assert list(one) == list(two)
    for column in one.columns.drop(["path", *OF_THE_MACHINE], errors="ignore"):
        if one[column].dtype == np.float64:
            np.testing.assert_allclose(
                two[column], one[column], rtol=1e-6, atol=1e-6, err_msg=f"{word}: {column}"
            )
        else:
            assert one[column].equals(two[column]), (word, column)


def compare(commands, ckpt, folder):
    """Run the commands in one process and in two, and compare the tables."""
    for count in (1, 2):
        run(
            count,
            [
                arguments(*command, ckpt, folder / f"{count}-{i}")
                for i, command in enumerate(commands)
            ],
        )
    for i, (word, _) in enumerate(commands):
        same(word, folder / f"1-{i}", folder / f"2-{i}")


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_two_processes_give_the_tables_of_one(group, ckpt, tmp_path):
    compare([quick(word, ckpt) for word in SHARED[group::GROUPS]], ckpt, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", FURTHER)
def test_also_where_a_process_has_no_image(group, ckpt, tmp_path):
    compare(FURTHER[group], ckpt, tmp_path)


@pytest.mark.slow
def test_torchrun_gives_the_table_of_one(ckpt, tmp_path):
    command = ("step-accuracy", 9)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "-m", "bvit_interp.cli", *arguments(*command, ckpt, tmp_path / "two")],
        check=True,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    run(1, [arguments(*command, ckpt, tmp_path / "one")])
    same(command[0], tmp_path / "one", tmp_path / "two")
