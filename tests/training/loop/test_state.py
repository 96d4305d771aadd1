"""The state of a run: written whole, and refused if another."""

from __future__ import annotations

import fcntl
import gc
import math
import os
import resource

import pytest
import torch

from bvit_interp.errors import UserError
from bvit_interp.training.loop import supervised


@pytest.fixture
def saved(recipe, tmp_path):
    """The state after one epoch of a run."""
    supervised.train(recipe(epochs=1), tmp_path / "run")
    return tmp_path / "run" / "state.pt"


def content_of(saved):
    return torch.load(saved, weights_only=True)


def test_a_state_comes_back_as_it_was(recipe, trainer, saved):
    run = trainer(recipe(epochs=1)).run
    run.resume(saved, recipe(epochs=1), content_of(saved)["data"])
    content = torch.load(saved, weights_only=True)
    for key, state in (("model", run.model), ("ema", run.ema.module)):
        assert all(
            torch.equal(content[key][name], tensor) for name, tensor in state.state_dict().items()
        )
    moments = run.optimizer.state_dict()["state"]
    assert moments.keys() == content["optimizer"]["state"].keys()
    assert all(
        torch.equal(moments[i][kind], tensor)
        for i, found in content["optimizer"]["state"].items()
        for kind, tensor in found.items()
    )
    assert run.done == 5
    assert (run.loss, run.norm, run.seconds) == (0, 0, 0)
    assert [row["epoch"] for row in run.history] == [1]


def test_a_run_of_another_process_in_the_folder(recipe, trainer, saved):
    before = saved.read_bytes()
    run, plan = trainer(recipe(epochs=1)).run, recipe(epochs=1)
    gc.collect()  # the run that saved it
    handle = os.open(saved.parent, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for begin in (
        lambda: run.resume(saved, plan, "data"),
        lambda: run.save(saved, plan, "data"),
        lambda: supervised.train(plan, saved.parent),
        lambda: supervised.train(plan, saved.parent, overwrite=True),
    ):
        with pytest.raises(UserError, match="another run is writing"):
            begin()
    assert saved.read_bytes() == before
    os.close(handle)
    run.resume(saved, plan, content_of(saved)["data"])
    handle = os.open(saved.parent, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, "lr: 0.001 there, 0.5 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"model": {"num_steps": 4}}, "model: .*'num_steps': 3.* there, .*'num_steps': 4.* now"),
        ({"flip": True, "epochs": 9}, "epochs: 1 there, 9 now; flip: False there, True now"),
    ],
)
def test_another_recipe_is_refused_by_what_differs(recipe, saved, change, named):
    before = saved.read_bytes()
    other = recipe(**{"epochs": 1, **change})
    with pytest.raises(
        UserError, match=rf"state.pt is of another recipe \({named}\); --overwrite starts again"
    ):
        supervised.train(other, saved.parent)
    assert saved.read_bytes() == before


def moments(content, change):
    """The optimizer's part of a state, its first moments changed."""
    state = dict(content["optimizer"]["state"])
    return {"optimizer": {**content["optimizer"], "state": {**state, 0: change(state[0])}}}


def settings(content, **changes):
    """The optimizer's part of a state, with other settings of its first group."""
    first, *rest = content["optimizer"]["param_groups"]
    return {"optimizer": {**content["optimizer"], "param_groups": [{**first, **changes}, *rest]}}


WRONG_PARTS = {
    "done before the start": lambda content: {"done": -5},
    "done after the end": lambda content: {"done": 10**6},
    "done a float": lambda content: {"done": 2.0},
    "loss a word": lambda content: {"loss": "x"},
    "loss nan": lambda content: {"loss": math.nan},
    "seconds a list": lambda content: {"seconds": [1]},
    "precision unknown": lambda content: {"precision": "int4"},
    "history of words": lambda content: {"history": ["a"]},
    "history a word": lambda content: {"history": "epoch"},
    "history lacks columns": lambda content: {"history": [{"epoch": 1}]},
    "history with words": lambda content: {
        "history": [{**row, "loss": "x"} for row in content["history"]] or [{"loss": "x"}]
    },
    "moments of another shape": lambda content: moments(
        content, lambda old: {**old, "exp_avg": torch.zeros(3, 3, 3)}
    ),
    "moments of words": lambda content: moments(content, lambda old: {**old, "exp_avg": "x"}),
    "decay a word": lambda content: settings(content, weight_decay="x"),
    "betas of one": lambda content: settings(content, betas=(0.9,)),
    "weights of words": lambda content: {"model": dict.fromkeys(content["model"], "x")},
}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda content, file: file.write_bytes(b""),
        lambda content, file: file.write_text("a state\nof another kind\n"),
        lambda content, file: torch.save([1, 2], file),
        lambda content, file: torch.save(
            {key: content[key] for key in content if key != "ema"}, file
        ),
        lambda content, file: torch.save({**content, "model": {}}, file),
        lambda content, file: torch.save(
            {**content, "optimizer": {"state": {}, "param_groups": []}}, file
        ),
        lambda content, file: torch.save({**content, "recipe": None}, file),
        *(
            lambda content, file, part=part: torch.save({**content, **part(content)}, file)
            for part in WRONG_PARTS.values()
        ),
    ],
    ids=[
        "cut",
        "empty",
        "text",
        "list",
        "no ema",
        "no weights",
        "no moments",
        "no recipe",
        *WRONG_PARTS,
    ],
)
def test_a_damaged_state_is_one_line_and_overwrite_starts_again(recipe, saved, damage):
    damage(torch.load(saved, weights_only=True), saved)
    with pytest.raises(
        UserError, match=r"state.pt: not the whole state of a run \(.+\); --overwrite"
    ) as error:
        supervised.train(recipe(epochs=1), saved.parent)
    assert "\n" not in str(error.value)
    supervised.train(recipe(epochs=1), saved.parent, overwrite=True)


def test_a_full_disk_leaves_the_state_that_is_there(recipe, trainer, saved):
    """The limit on a file's size stands for the disk: torch's own writer meets a write that does
    not fit."""
    before = saved.read_bytes()
    run = trainer(recipe(epochs=1)).run
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"state\.pt: the state cannot be written \(.+\)$"
        ) as error:
            run.save(saved, recipe(epochs=1), "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert saved.read_bytes() == before
    assert not list(saved.parent.glob(".*"))
