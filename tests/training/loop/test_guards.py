"""What a run refuses, and what it never overwrites."""

from __future__ import annotations

import shutil

import pytest
import torch

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import DataError, UserError
from bvit_interp.models.checkpoint import load
from bvit_interp.training.loop import build, epochs, feed, study, supervised
from bvit_interp.training.loop import trainer as run_trainer
from bvit_interp.training.loop.recipe import read


def test_a_folder_that_holds_no_run_is_left_alone(recipe, tmp_path):
    supervised.train(recipe(epochs=1), tmp_path / "run")
    (tmp_path / "run" / "state.pt").unlink()  # as in a clone: states are not committed
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="run holds history.csv, model.safetensors, .* --overwrite"):
        supervised.train(recipe(epochs=1, seed=1), tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    supervised.train(recipe(epochs=1, seed=1), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_overwriting_leaves_nothing_of_the_old_run_beside_the_new_one(
    recipe, tmp_path, monkeypatch
):
    supervised.train(recipe(epochs=1), tmp_path / "run")

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_trainer.Trainer, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        supervised.train(recipe(epochs=1, seed=1), tmp_path / "run", overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state.pt"]


def test_a_finished_run_writes_what_was_deleted(recipe, tmp_path):
    model = supervised.train(recipe(epochs=1), tmp_path / "run")
    for name in ("model.safetensors", "history.csv"):
        (tmp_path / "run" / name).unlink()
    supervised.train(recipe(epochs=1), tmp_path / "run")
    again = load(tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert (tmp_path / "run" / "history.csv").is_file()


def test_other_images_under_the_same_name_are_refused(recipe, tmp_path, monkeypatch):
    supervised.train(recipe(epochs=1), tmp_path / "run")
    monkeypatch.setattr(feed, "fingerprint", lambda samples: "of others")
    with pytest.raises(UserError, match="is of other images than digits-s holds now"):
        supervised.train(recipe(epochs=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_epochs": 2, "epochs": 2}, "warmup_epochs 2 must be less than epochs 2"),
        (
            {"warmup_epochs": 0.5, "schedule": "epoch"},
            "schedule epoch needs whole warmup_epochs, got 0.5",
        ),
        ({"clip": 0}, "clip must be > 0, or null"),
        ({"ema": 1.0}, "ema must be less than 1"),
        (
            {"model": {"checkpoint_path": "x.pt"}},
            "the model does not take checkpoint_path; weights come from init",
        ),
    ],
)
def test_settings_that_would_not_do_what_they_say(recipe, change, message):
    with pytest.raises(UserError, match=message):
        recipe(**change)


def test_models_that_would_not_be_what_they_seem(recipe, tmp_path):
    samples = DigitScenes("train")
    with pytest.raises(UserError, match=r"patches of \(5, 5\) do not tile \(32, 32\) pixels"):
        build.make_model(recipe(model={"patch_size": 5}), samples)
    with pytest.raises(UserError, match="cannot make the model .*divisible by 4"):
        build.make_model(
            recipe(positions="sincos", model={"embed_dim": 30, "num_heads": 2}), samples
        )
    supervised.train(recipe(epochs=1), tmp_path / "base")
    heads = load(tmp_path / "base").blocks[0].attn.num_heads
    with pytest.raises(UserError, match=f"base has {heads} heads, the model {2 * heads}"):
        build.make_model(
            recipe(init=str(tmp_path / "base"), model={"num_heads": 2 * heads}), samples
        )


def test_compiling_without_a_compiler(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="compile needs a C\\+\\+ compiler"):
        supervised.train(recipe(compile=True), tmp_path / "run")


class Damaged(DigitScenes):
    """digits-s with every third image unreadable."""

    def read(self, i):
        if i % 3 == 0:
            raise DataError(f"{self.name(i)}: the image cannot be read")
        return super().read(i)


def test_skip_corrupt_shows_the_next_image(recipe, caplog, monkeypatch):
    monkeypatch.setattr(epochs, "training_samples", lambda recipe, samples, epoch: samples)
    samples = Damaged("train", length=30)
    view = lambda image, draws: torch.from_numpy(image.copy())  # noqa: E731
    plan = recipe(images_per_epoch=30, batch_size=30, skip_corrupt=True)
    images, labels, _ = epochs.Epoch(plan, samples, view, 0)[0]
    order = epochs.Epoch(plan, samples, view, 0).order
    shown = [i + 1 if i % 3 == 0 else i for i in order.tolist()]
    assert all(
        torch.equal(images[k], torch.from_numpy(samples.read(i)[0])) for k, i in enumerate(shown)
    )
    assert labels.tolist() == [samples.read(i)[1] for i in shown]
    assert "digits-s/train/000003: the image cannot be read" in caplog.text
    assert (
        "cannot be read"
        in epochs.Epoch(recipe(images_per_epoch=30, batch_size=30), samples, view, 0)[0]
    )


def test_data_may_hold_any_character():
    assert read("digits-s", ["lr=0.5"], "folder:a #2: {b}").data == "folder:a #2: {b}"
    assert read("digits-s", [], "123").data == "123"


def test_a_recipe_extends_the_file_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: digits-s\nlr: 0.125\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nseed: 3\n")
    plan = read(str(tmp_path / "mine.yaml"))
    assert (plan.lr, plan.seed) == (0.125, 3)


@pytest.mark.parametrize("setting", ["seed=9", "model.num_steps=2"])
def test_a_study_refuses_settings_of_its_points(setting):
    with pytest.raises(
        UserError, match="study blocks: its points and seeds set .*; not " + setting
    ):
        study.read("blocks", settings=(setting,))
