"""Training under masks: what is trained, what is scored, and what a run in the folder refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.models.checkpoint import load
from bvit_interp.models.masks import PLACES, Masks, full, masked
from bvit_interp.results import read_table
from bvit_interp.training.loop import build, supervised
from bvit_interp.training.loop import trainer as run_trainer


@pytest.fixture
def first(recipe):
    """``first(**changes)``: the recipe's model before its first step."""
    return lambda **changes: build.make_model(recipe(**changes), open_samples("digits-s", "train"))


def half(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Masks(
        {
            name: torch.rand(mask.shape, generator=generator) < 0.5
            for name, mask in full(model).items()
        }
    )


def killed_at(step, monkeypatch):
    original = run_trainer.Trainer._step

    def dying(trainer, *batch):
        if trainer.run.done == step:
            raise KeyboardInterrupt
        return original(trainer, *batch)

    monkeypatch.setattr(run_trainer.Trainer, "_step", dying)
    return lambda: monkeypatch.setattr(run_trainer.Trainer, "_step", original)


def test_full_masks_train_as_no_masks_do(recipe, first, tmp_path):
    supervised.train(recipe(full=True, autocast="off"), tmp_path / "plain")
    supervised.train(
        recipe(full=True, autocast="off"), tmp_path / "masked", masks=full(first(full=True))
    )
    plain, under = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "masked")
    )
    assert all(torch.allclose(under[name], tensor, atol=1e-6) for name, tensor in plain.items())
    assert not (tmp_path / "plain" / "masks.safetensors").exists()


def test_weights_that_no_step_keeps_stay_as_they_were(recipe, first, tmp_path):
    init = first()
    masks = half(init)
    supervised.train(recipe(weight_decay=0), tmp_path, masks=masks)
    trained = load(tmp_path).blocks[0]
    for name, place in PLACES.items():
        kept = masks.union()[name][0]
        before, after = (
            init.blocks[0].get_submodule(place).weight,
            trained.get_submodule(place).weight,
        )
        assert torch.equal(after[~kept], before[~kept])
        assert (after[kept] != before[kept]).float().mean() > 0.99
    assert not torch.equal(trained.norm1.weight, init.blocks[0].norm1.weight)


def test_scores_are_those_of_the_masked_model(recipe, first, tmp_path):
    masks = half(first())
    supervised.train(recipe(lr=5e-3), tmp_path, masks=masks)
    samples = open_samples("digits-s")
    model, averaged = load(f"{tmp_path}@masked"), masked(load(f"{tmp_path}@ema"), masks, baked=True)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    shown = torch.stack(
        [
            (torch.from_numpy(samples.read(i)[0]).permute(2, 0, 1) / 255 - mean) / std
            for i in range(40)
        ]
    )
    labels = torch.tensor([samples.read(i)[1] for i in range(40)])
    last = read_table(tmp_path / "history.csv").iloc[-1]
    for one, column in ((model, "test_loss"), (averaged, "ema_loss")):
        metric = Classification(10)
        with torch.no_grad():
            metric.update(one(shown), labels)
        assert metric.compute()["loss"] == pytest.approx(last[column], abs=1e-4)
    with torch.no_grad():
        assert not torch.allclose(load(tmp_path)(shown), model(shown), atol=1e-3)
    assert f"{tmp_path}@masked`" in (tmp_path / "README.md").read_text()


def test_killed_and_resumed_under_masks(recipe, first, tmp_path, monkeypatch, same_run):
    plan, masks = recipe(full=True, compile=True), half(first(full=True))
    supervised.train(plan, tmp_path / "undisturbed", masks=masks)  # nothing is compiled
    monkeypatch.setattr(run_trainer, "_CHECKED_EVERY", 2)
    for step in (3, 5, 9):
        undo = killed_at(step, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            supervised.train(plan, tmp_path / "run", save_minutes=0, masks=masks)
        undo()
    supervised.train(plan, tmp_path / "run", save_minutes=0, masks=masks)
    same_run(tmp_path / "undisturbed", tmp_path / "run")
    file = "masks.safetensors"
    assert (tmp_path / "undisturbed" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_a_run_goes_on_under_its_own_masks_alone(recipe, first, tmp_path):
    masks = half(first())
    supervised.train(recipe(epochs=1), tmp_path / "masked", masks=masks)
    supervised.train(recipe(epochs=1), tmp_path / "plain")
    for folder, other in (("masked", half(first(), seed=1)), ("masked", None), ("plain", masks)):
        with pytest.raises(
            UserError, match=r"state.pt was trained under other masks than these; --overwrite"
        ):
            supervised.train(recipe(epochs=1), tmp_path / folder, masks=other)
    supervised.train(recipe(epochs=1), tmp_path / "masked", overwrite=True)
    assert not (tmp_path / "masked" / "masks.safetensors").exists()


def test_a_finished_run_writes_masks_that_were_deleted(recipe, first, tmp_path):
    masks = half(first())
    supervised.train(recipe(epochs=1), tmp_path, masks=masks)
    (tmp_path / "masks.safetensors").unlink()
    supervised.train(recipe(epochs=1), tmp_path, masks=masks)
    load(f"{tmp_path}@masked")


def test_masks_of_another_model_stop_before_anything_is_written(recipe, first, tmp_path):
    with pytest.raises(UserError, match="masks of 4 steps for a model of 3"):
        supervised.train(recipe(), tmp_path / "run", masks=full(first(model={"num_steps": 4})))
    assert not (tmp_path / "run").exists()
