"""Training in real processes, for test_processes.py.

``python driver.py JOBS.json``: each job is a list of runs into one folder, one after another, each
of one or two processes; a run that names a step kills itself there with SIGKILL, in the step or
while it writes the state.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from bvit_interp.data import digits
from bvit_interp.training.loop import supervised
from bvit_interp.training.loop import trainer as run_trainer
from bvit_interp.training.loop.recipe import Recipe

TEST_IMAGES, SAVED_EVERY = 40, 3


def train(recipe, out, rank, world, meeting, kill_at, in_writing):
    """What a process does; the state is saved at every third step."""
    torch.set_num_threads(1)
    digits.LENGTHS["test"] = TEST_IMAGES
    run_trainer._CHECKED_EVERY = SAVED_EVERY
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
        )
    step, write = run_trainer.Trainer._step, torch.save

    def dying(trainer, *batch):
        if trainer.run.done == kill_at and not in_writing:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *batch)

    def dying_in_writing(content, path):
        write(content, path)
        if content["done"] >= kill_at:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        run_trainer.Trainer._step = dying
        if in_writing:
            torch.save = dying_in_writing
    supervised.train(Recipe(**recipe), Path(out), save_minutes=0)
    if world > 1:
        dist.destroy_process_group()


def forked(work, world=1):
    """`work(rank, meeting)` in `world` forked processes; returns how they ended."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(rank, Path(folder, "meeting"))
                    code = 0
                finally:  # an exception is printed, and the fork never goes on as the parent
                    if code:
                        sys.excepthook(*sys.exc_info())
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(recipe, out, world=1, kill_at=None, in_writing=False):
    """One run; returns how its processes ended."""
    return forked(
        lambda rank, meeting: train(recipe, out, rank, world, meeting, kill_at, in_writing), world
    )


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        for attempt in job["runs"]:
            dies = attempt.get("kill_at") is not None
            ended = run(job["recipe"] | attempt.pop("settings", {}), job["out"], **attempt)
            wanted = -signal.SIGKILL if dies else 0
            assert set(ended) == {wanted}, (job["out"], attempt, ended)
