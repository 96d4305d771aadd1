"""Runs of real processes: killed and resumed, and shared by two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from bvit_interp.training.loop import supervised
from bvit_interp.training.loop.recipe import Recipe

DRIVER = Path(__file__).with_name("driver.py")
PAIRS = {"plain": {}, "in two parts": {"accumulate": 2}}


@pytest.fixture
def drive(tmp_path):
    """``drive(jobs)``: the processes of driver.py."""

    def run(jobs):
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(DRIVER), str(tmp_path / "jobs.json")],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.slow
def test_killed_and_resumed_or_shared_by_two_processes(
    settings, pictures, tmp_path, drive, same_run, history
):
    """One test, because Python and torch take most of its time to start.

    An epoch has 5 steps and the state is saved after step 3 of each: a kill at step 5 (from 1) or
    at the first of the second epoch loses work; in the first epoch no checkpoint is there yet.
    Scenes are drawn by workers, pictures lie on the device of each process.
    """
    full, plain = settings(full=True), settings(crop="padded", flip=True, lr=1e-3)
    resident, resident_plain = (
        settings(full=True, **pictures),
        settings(crop="padded", flip=True, **pictures),
    )
    names = ("killed", "pair", "resident", "resident pair", *PAIRS)
    out = {name: str(tmp_path / name) for name in names}
    jobs = [
        {
            "recipe": full,
            "out": out["killed"],
            "runs": [
                {"kill_at": 4, "settings": {"workers": 1}},
                {"kill_at": 5, "in_writing": True},
                {"kill_at": 8, "settings": {"workers": 1}},
                {},
            ],
        },
        *(
            {"recipe": plain | change, "out": out[name], "runs": [{"world": 2}]}
            for name, change in PAIRS.items()
        ),
        {"recipe": plain, "out": out["pair"], "runs": [{"world": 2, "kill_at": 4}, {"world": 2}]},
        {"recipe": resident, "out": out["resident"], "runs": [{"kill_at": 4}, {"kill_at": 8}, {}]},
        {
            "recipe": resident_plain,
            "out": out["resident pair"],
            "runs": [{"world": 2, "kill_at": 4}, {"world": 2}],
        },
    ]
    drive(jobs)
    supervised.train(Recipe(**full), tmp_path / "undisturbed")
    same_run(tmp_path / "undisturbed", tmp_path / "killed")
    same_run(tmp_path / "plain", tmp_path / "pair")
    supervised.train(Recipe(**resident), tmp_path / "resident undisturbed")
    same_run(tmp_path / "resident undisturbed", tmp_path / "resident")

    for recipe, names in ((plain, PAIRS), (resident_plain, ["resident pair"])):
        alone = tmp_path / f"one of {len(names)}"
        supervised.train(Recipe(**recipe), alone)
        one, table = load_file(alone / "model.safetensors"), history(alone)
        for name in names:
            two = load_file(tmp_path / name / "model.safetensors")
            for key, tensor in one.items():
                np.testing.assert_allclose(
                    two[key], tensor, rtol=0, atol=1e-5, err_msg=f"{name}: {key}"
                )
            np.testing.assert_allclose(
                history(tmp_path / name), table, rtol=1e-4, atol=1e-5, err_msg=name
            )
