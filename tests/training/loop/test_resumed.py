"""Runs that are killed or fail end with the same weights."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import load
from bvit_interp.training.loop import preload, supervised
from bvit_interp.training.loop import trainer as run_trainer

STEPS = 5  # of an epoch


class Killed(Exception):
    """In place of SIGKILL, which test_processes.py sends."""


@pytest.fixture
def often(monkeypatch):
    """The state is saved after every second step of an epoch, and looked at for NaN."""
    monkeypatch.setattr(run_trainer, "_CHECKED_EVERY", 2)


def killed_at(step, monkeypatch):
    """Training raises `Killed` in step `step` (from 0); returns what undoes it."""
    original = run_trainer.Trainer._step

    def dying(trainer, *batch):
        if trainer.run.done == step:
            raise Killed
        return original(trainer, *batch)

    monkeypatch.setattr(run_trainer.Trainer, "_step", dying)
    return lambda: monkeypatch.setattr(run_trainer.Trainer, "_step", original)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("data", ["digits-s", "pictures"])
@pytest.mark.parametrize(
    "change",
    [
        {"full": True},
        {
            "accumulate": 2,
            "crop": "random-resized",
            "randaugment": "rand-m9-mstd0.5-inc1",
            "positions": "sincos",
            "schedule": "epoch",
            "warmup_epochs": 1,
            "ema": 0.7,
            "grad_checkpointing": True,
            "mixup": 0.5,
        },
    ],
    ids=["full", "other words"],
)
def test_killed_in_any_step_it_ends_with_the_same_weights(
    recipe, pictures, tmp_path, often, monkeypatch, same_run, change, data
):
    """Scenes are drawn as they are needed, pictures lie on the device."""
    plan = recipe(**change, **(pictures if data == "pictures" else {}))
    supervised.train(plan, tmp_path / "undisturbed")
    for step in (
        0,
        1,
        3,
        STEPS,
        2 * STEPS - 1,
    ):  # 3: one step after a state; STEPS: at the start of an epoch
        undo = killed_at(step, monkeypatch)
        with pytest.raises(Killed):
            supervised.train(plan, tmp_path / "run", save_minutes=0, overwrite=step == 0)
        undo()
    supervised.train(plan, tmp_path / "run", save_minutes=0)
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_workers_and_scoring_may_change_when_it_goes_on(
    recipe, tmp_path, often, monkeypatch, same_run
):
    supervised.train(recipe(full=True), tmp_path / "undisturbed")
    undo = killed_at(7, monkeypatch)
    with pytest.raises(Killed):
        supervised.train(recipe(full=True, workers=1), tmp_path / "run", save_minutes=0)
    undo()
    supervised.train(recipe(full=True, score_every=2), tmp_path / "run", save_minutes=0)
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_the_memory_of_the_machine_may_change_when_it_goes_on(
    recipe, pictures, tmp_path, often, monkeypatch, same_run
):
    """Pictures that lie on the device in one part of the run, and do not fit in the other."""
    plan = recipe(full=True, **pictures)
    supervised.train(plan, tmp_path / "undisturbed")
    undo = killed_at(7, monkeypatch)
    with pytest.raises(Killed):
        supervised.train(plan, tmp_path / "run", save_minutes=0)
    undo()
    monkeypatch.setattr(preload, "HOST_BYTES", 0)
    supervised.train(plan, tmp_path / "run", save_minutes=0)
    same_run(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")]
)
def test_a_failure_while_the_state_is_written(
    recipe, tmp_path, often, monkeypatch, same_run, error
):
    supervised.train(recipe(full=True), tmp_path / "undisturbed")
    original, written = torch.save, []

    def failing(content, path):
        original(content, path)
        written.append(content["done"])
        if len(written) == 3:
            path.write_bytes(path.read_bytes()[:5000])
            raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(UserError, match=r"state\.pt: the state cannot be written \(.*(space|pos)"):
        supervised.train(recipe(full=True), tmp_path / "run", save_minutes=0)
    assert written == [0, 2, 4]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["done"] == 2
    assert not list((tmp_path / "run").glob(".*"))
    supervised.train(recipe(full=True), tmp_path / "run", save_minutes=0)
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_a_failure_while_the_checkpoint_is_written(recipe, tmp_path, often, monkeypatch, same_run):
    supervised.train(recipe(full=True), tmp_path / "undisturbed")
    original, calls = safetensors.torch.save_file, []

    def failing(*given, **named):
        calls.append(given)
        if len(calls) == 4:  # the averaged weights of the second epoch
            raise OSError(28, "No space left on device")
        return original(*given, **named)

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        supervised.train(recipe(full=True), tmp_path / "run", save_minutes=0)
    load(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["epoch"] == 1
    supervised.train(recipe(full=True), tmp_path / "run", save_minutes=0)
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_a_finished_run_started_again_changes_nothing(recipe, tmp_path, monkeypatch):
    model = supervised.train(recipe(), tmp_path)
    before = bytes_of(tmp_path)
    monkeypatch.setattr(run_trainer.Trainer, "_step", None)  # no step is taken
    again = supervised.train(recipe(), tmp_path)
    assert bytes_of(tmp_path) == before
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_overwrite_starts_again(recipe, tmp_path, often, monkeypatch, same_run):
    supervised.train(recipe(), tmp_path / "undisturbed")
    supervised.train(recipe(lr=0.5, epochs=1), tmp_path / "run")
    supervised.train(recipe(), tmp_path / "run", overwrite=True)
    same_run(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_it_with_the_last_good_state_kept(
    recipe, tmp_path, often, monkeypatch, same_run, kind
):
    supervised.train(recipe(), tmp_path / "undisturbed")
    objective, calls = run_trainer.objective, []

    def poisoned(*given):
        def loss(*batch):
            calls.append(1)
            value = objective(*given)(*batch)
            if len(calls) != 8:  # step 3 of the second epoch
                return value
            return (
                value * torch.nan if kind == "loss" else value + (0 * value).sqrt()
            )  # whose gradient is 0 / 0

        return loss

    monkeypatch.setattr(run_trainer, "objective", poisoned)
    wrong = "the loss is nan" if kind == "loss" else r"the loss is 2.* and its gradient's norm nan"
    with pytest.raises(
        UserError, match=rf"{wrong}.* in epoch 2, step 3 of 5; .*run holds the last good state$"
    ):
        supervised.train(recipe(), tmp_path / "run", save_minutes=0)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["done"] == 7
    assert all(
        tensor.isfinite().all() for key in ("model", "ema") for tensor in state[key].values()
    )
    load(tmp_path / "run")
    monkeypatch.setattr(run_trainer, "objective", objective)
    supervised.train(recipe(), tmp_path / "run", save_minutes=0)
    same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_nan_in_the_first_step_leaves_a_run_that_any_recipe_may_start_again(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        run_trainer,
        "objective",
        lambda *given: lambda output, target, images: output.sum() * torch.inf,
    )
    with pytest.raises(UserError, match="in epoch 1, step 1 of 5; .*run holds the last good state"):
        supervised.train(recipe(), tmp_path / "run")
    monkeypatch.undo()
    supervised.train(recipe(lr=0.5), tmp_path / "run")
    load(tmp_path / "run")
