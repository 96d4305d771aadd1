"""Real processes for test_by_step.py: one start of Python, a fork per process that prunes.

``python prune_driver.py JOB.json``: prunings into one folder, one after another, each of one or two
processes; one with a `kill` kills itself there with SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from bvit_interp import results
from bvit_interp.data import digits
from bvit_interp.models.masks import Masks
from bvit_interp.training.loop import trainer as run_trainer
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning import by_step, graft_training
from bvit_interp.training.pruning.step_plan import StepPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loop"))
from driver import forked

TEST_IMAGES = 40


def die():
    """As when the power goes."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(owner, name, when, after=False):
    """Let `owner.name` kill the process at the call for which `when(*arguments)` is true, or after
    it."""
    original = getattr(owner, name)

    def call(*given, **named):
        fatal = when(*given)
        if fatal and not after:
            die()
        result = original(*given, **named)
        if fatal:
            die()
        return result

    setattr(owner, name, call)


def half_written(state):
    """Let torch.save die in the middle of a state of grafts."""
    original = torch.save

    def write(content, path):
        original(content, path)
        if "grafts" in content and content["done"] == state:
            os.truncate(path, path.stat().st_size // 2)
            die()

    torch.save = write


KILLS = {
    "while grafts are written": lambda: half_written(5),
    "in a graft": lambda: dying(
        graft_training._Training, "_step", lambda grafts, *_: grafts.done == 7
    ),
    "between grafts and masks": lambda: dying(
        results, "write_table", lambda frame, path: path.name == "grafts.csv", after=True
    ),
    "after the masks": lambda: dying(
        Masks, "save", lambda masks, path, model: path.name == "pruned.safetensors", after=True
    ),
    "in a training": lambda: dying(
        run_trainer.Trainer,
        "_step",
        lambda run, *_: (run.out.name, run.run.done) == ("round-02", 3),
    ),
    "before a row": lambda: dying(results.Table, "append", lambda table, row: row["round"] == 2),
    "after a row": lambda: dying(
        results.Table, "append", lambda table, row: row["round"] == 2, after=True
    ),
    "while a round is copied": lambda: dying(shutil, "copytree", lambda *_: True, after=True),
}


def work(job, out, rank, world, meeting, kill):
    """What a process does."""
    torch.set_num_threads(1)
    digits.LENGTHS["test"] = TEST_IMAGES
    run_trainer._CHECKED_EVERY = 2
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
        )
    if kill is not None:
        KILLS[kill]()
    job["pruning"]["methods"] = tuple(job["pruning"]["methods"])
    by_step.run(Recipe(**job["recipe"]), StepPlan(**job["pruning"]), Path(out), save_minutes=0)
    if world > 1:
        dist.destroy_process_group()


def run(job, out, world=1, kill=None):
    """One pruning; returns how its processes ended."""
    return forked(lambda rank, meeting: work(job, out, rank, world, meeting, kill), world)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    for attempt in job["runs"]:
        ended = run(job, **attempt)
        wanted = -signal.SIGKILL if attempt.get("kill") else 0
        assert set(ended) == {wanted}, (attempt, ended)
