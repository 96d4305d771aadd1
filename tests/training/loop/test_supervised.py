"""A run: checkpoint, table, card, schedule, average, clipping and accumulation."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import MissingExtra, UserError
from bvit_interp.models.checkpoint import load
from bvit_interp.results import read_table
from bvit_interp.training.loop import scoring, supervised
from bvit_interp.training.loop import trainer as run_trainer

STEPS = 5  # of an epoch


def by_numpy(model, scenes):
    """top1, top5 and loss of a model on scenes, from its logits."""
    images, labels, _ = zip(*(scenes.read(i) for i in range(len(scenes))), strict=True)
    mean, std = (np.array(model.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = torch.tensor((np.array(images) / 255.0 - mean) / std, dtype=torch.float32).permute(
        0, 3, 1, 2
    )
    with torch.no_grad():
        logits = model(pixels).double().numpy()
    own = logits[np.arange(len(labels)), labels]
    above = (logits > own[:, None]).sum(1)
    return (above == 0).mean(), (above < 5).mean(), (np.log(np.exp(logits).sum(1)) - own).mean()


# ---- what a run leaves


def test_a_run_leaves_a_checkpoint_a_table_and_a_card(recipe, tmp_path):
    plan = recipe(label_smoothing=0.1, score_every=2, epochs=3)
    model = supervised.train(plan, tmp_path / "run")
    again, images = load(tmp_path / "run"), torch.randn(2, 3, 32, 32)
    assert not model.training
    assert torch.equal(again(images), model(images))
    assert again.pretrained_cfg["label_names"] == list(DigitScenes.classes)
    table = read_table(tmp_path / "run" / "history.csv")
    assert list(table) == list(run_trainer.COLUMNS)
    assert table["epoch"].tolist() == [1, 2, 3]
    for column in ("top1", "ema_top1", "test_loss", "ema_loss", "top5", "ema_top5"):
        assert table[column].isna().tolist() == [
            True,
            False,
            False,
        ]  # the last epoch is always scored
    last = table.iloc[-1]
    for prefix, name in (("", "run"), ("ema_", "run@ema")):
        top1, top5, loss = by_numpy(load(tmp_path / name), DigitScenes("test"))
        assert last[f"{prefix}top1"] == pytest.approx(top1)
        assert last[f"{prefix}top5"] == pytest.approx(top5)
        assert last["ema_loss" if prefix else "test_loss"] == pytest.approx(loss, rel=1e-5)
    assert (table["images_per_second"] > 0).all() and (table["mfu"] > 0).all()
    assert f"raw weights {100 * last['top1']:.2f} %" in (tmp_path / "run" / "README.md").read_text()
    about = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert about["recipe"]["label_smoothing"] == 0.1
    assert about["epoch"] == 3
    assert not list(tmp_path.glob(".*")) + list((tmp_path / "run").glob(".*"))


@pytest.fixture
def two_classes(tmp_path):
    """Folders of dark and of bright noise, 50 x 40 pixels, to train on and to score on."""
    rng = np.random.default_rng(0)
    for split, (name, level) in (
        (s, c) for s in ("train", "test") for c in (("dark", 0), ("light", 155))
    ):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = level + rng.integers(0, 100, (50, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_the_model_that_comes_back_is_the_one_that_opens(recipe, tmp_path):
    """Nothing of training is left on it: recomputation, or the attention kernel that bf16 is
    trained with."""
    model = supervised.train(recipe(autocast="bf16", grad_checkpointing=True, epochs=1), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path)(images), model(images))
    assert not model.grad_checkpointing
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_two_classes_in_folders(recipe, tmp_path, two_classes):
    """It learns them; top5 is not defined there: config.json stays JSON, and the card does not
    speak of it."""
    plan = recipe(
        data=f"folder:{two_classes}",
        crop="random-resized",
        images_per_epoch=None,
        batch_size=4,
        epochs=4,
        lr=0.01,
        model={"num_classes": 2},
    )
    supervised.train(plan, tmp_path / "run")
    table = read_table(tmp_path / "run" / "history.csv")
    assert table["loss"].iloc[0] > 0.5  # log 2 = 0.69
    assert table["loss"].iloc[-1] < 0.1
    assert table["top1"].iloc[-1] == 1

    def no_constant(name):
        raise ValueError(name)

    config = json.loads((tmp_path / "run" / "config.json").read_text(), parse_constant=no_constant)
    assert config["pretrained_cfg"]["label_names"] == ["dark", "light"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "raw weights 100.00 % (cross-entropy" in card and "nan" not in card


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_used(recipe, tmp_path, two_classes, workers):
    plan = recipe(
        data=f"folder:{two_classes}",
        crop="random-resized",
        images_per_epoch=None,
        model={"num_classes": 2},
        workers=workers,
    )
    with pytest.raises(
        UserError,
        match="an image of 50 x 40 pixels for a model of 32 x 32: use crop=random-resized",
    ):
        supervised.train(dataclasses.replace(plan, crop="none"), tmp_path / "run")
    for i in range(6):
        (two_classes / "train" / "dark" / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"^[^\n]+train/dark/\d\.png: the image cannot be read[^\n]+$"
    ):
        supervised.train(plan, tmp_path / "run")
    (two_classes / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="its only split is train"):
        supervised.train(plan, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_real_run_on_cifar(recipe, tmp_path, real, monkeypatch):
    monkeypatch.setattr(scoring, "Loader", functools.partial(scoring.Loader, limit=200))
    plan = recipe(
        data=f"cifar10:{real('cifar10')}",
        crop="padded",
        flip=True,
        epochs=1,
        images_per_epoch=16,
        model={"num_steps": 1},
    )
    supervised.train(plan, tmp_path)
    assert read_table(tmp_path / "history.csv")["top1"].iloc[0] == pytest.approx(0.1, abs=0.08)


def test_tensorboard(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'bvit-interp\[tensorboard\]'"):
        supervised.train(recipe(epochs=1), tmp_path / "none", tensorboard=True)
    logged = []
    writer = SimpleNamespace(
        add_scalar=lambda *given: logged.append(given), flush=lambda: None, close=lambda: None
    )
    module = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    supervised.train(recipe(), tmp_path / "run", tensorboard=True)
    last = read_table(tmp_path / "run" / "history.csv").iloc[-1]
    assert ("loss", last["loss"], 2) in logged
    assert {name for name, _, _ in logged} == set(run_trainer.COLUMNS)


# ---- one step


def watched(trainer, look):
    """A trainer whose optimiser calls `look(trainer)` before each step; its whole run is done."""
    step = trainer.run.optimizer.step

    def looked(*given):
        look(trainer)
        return step(*given)

    trainer.run.optimizer.step = looked
    while trainer.run.done < trainer.total:
        for _ in trainer.epoch(
            SimpleNamespace(update=lambda: None, set_postfix=lambda **shown: None)
        ):
            pass
    return trainer


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_the_learning_rate_in_the_optimiser(recipe, trainer, schedule):
    found = []
    plan = recipe(
        epochs=4, warmup_epochs=1, schedule=schedule, warmup_factor=0.1, lr=0.01, min_lr=0.001
    )
    done = watched(
        trainer(plan),
        lambda t: found.append([group["lr"] for group in t.run.optimizer.param_groups]),
    )
    assert all(len(set(rates)) == 1 for rates in found)
    unit = STEPS if schedule == "step" else 1
    for step, (rate, *_) in enumerate(found):
        t = step if schedule == "step" else step // STEPS
        cosine = 0.001 + 0.009 * (1 + np.cos(np.pi * (t - unit) / (3 * unit))) / 2
        assert rate == pytest.approx(0.01 * (0.1 + 0.9 * t / unit) if t < unit else cosine)
    assert [row["lr"] for row in done.run.history] == [
        found[i][0] for i in range(STEPS - 1, 4 * STEPS, STEPS)
    ]


def test_the_average_follows_in_warm_up_and_decays_after(recipe, trainer):
    plan = recipe(warmup_epochs=0.4, ema=0.5)  # 2 of 10 steps
    made, weights = trainer(plan), []
    average = made.run.average

    def noted():
        average()
        weights.append({key: value.clone() for key, value in made.run.model.state_dict().items()})
        if len(weights) <= 3:  # two steps of warm-up, and the first after it
            assert all(
                torch.equal(value, weights[-1][key])
                for key, value in made.run.ema.module.state_dict().items()
            )

    made.run.average = noted
    watched(made, lambda t: None)
    expected = weights[2]
    for later in weights[3:]:
        expected = {key: 0.5 * expected[key] + 0.5 * later[key] for key in expected}
    for key, value in made.run.ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)


def test_the_papers_decay_in_a_short_run_leaves_an_untrained_average(recipe, trainer):
    """The trap: 0.99995 forgets the beginning in 20,000 steps; by default the horizon is a share of
    the run."""
    left = {}
    for ema in (0.99995, None):
        made = watched(trainer(recipe(ema=ema, epochs=4, score_every=9)), lambda t: None)
        start, raw, mean = (
            torch.nn.utils.parameters_to_vector(model.parameters())
            for model in (trainer(recipe()).run.model, made.run.model, made.run.ema.module)
        )
        left[ema] = ((mean - raw).norm() / (start - raw).norm()).item()
    assert left[0.99995] > 0.8
    assert left[None] < 0.1


def test_clipping(recipe, trainer):
    for clip in (0.01, None):
        norms = []

        def look(t, norms=norms):
            norms.append(
                torch.stack([p.grad.norm() for p in t.run.model.parameters()]).norm().item()
            )

        done = watched(trainer(recipe(clip=clip)), look)
        if clip:
            assert norms == pytest.approx([0.01] * 2 * STEPS, rel=1e-3)
            clipped = done.run.history[1]["grad_norm"]
        else:
            told = [row["grad_norm"] for row in done.run.history]
            assert told == pytest.approx([np.mean(norms[:STEPS]), np.mean(norms[STEPS:])], rel=1e-5)
    assert clipped > 0.1  # told as it was before


@pytest.mark.parametrize(
    "change", [{"accumulate": 2}, {"accumulate": 8}, {"grad_checkpointing": True}]
)
def test_parts_and_recomputation_change_nothing(recipe, tmp_path, history, change):
    for name, own in (("one", {}), ("other", change)):
        supervised.train(recipe(crop="padded", mixup=0.2, **own), tmp_path / name)
    one, other = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("one", "other")
    )
    for key, tensor in one.items():
        if key.endswith(
            "qkv.bias"
        ):  # of the keys: it moves no output, and AdamW enlarges its rounding errors
            tensor[32:64] = other[key][32:64]
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        history(tmp_path / "other"), history(tmp_path / "one"), rtol=1e-5, atol=1e-6
    )


def test_labels_are_smoothed_once_with_mixup_and_without(recipe, trainer):
    """Where all logits are equal the loss is log C for any target; where one is not, by hand."""
    logits, labels = torch.tensor([[2.0, *[0.0] * 9]] * 2), torch.tensor([0, 3])
    log = logits.log_softmax(1)
    expected = -(0.9 * torch.stack([log[0, 0], log[1, 3]]) + 0.1 * log.mean(1)).mean()
    made = trainer(recipe(label_smoothing=0.1, mixup=0.2))
    assert made.objective(logits, labels, None).item() == pytest.approx(expected.item())
    soft = 0.9 * torch.nn.functional.one_hot(labels, 10) + 0.01
    assert made.objective(logits, soft, None).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 3}, r"batch_size 8 is not divisible by 3 \(processes x accumulate\)"),
        (
            {"batch_size": 60_000, "images_per_epoch": None},
            "an epoch of 50000 images is less than a batch of 60000",
        ),
        ({"data": "nowhere"}, "no data set or folder 'nowhere'"),
    ],
)
def test_a_recipe_that_does_not_fit(recipe, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        supervised.train(recipe(**change), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder that can be written to"):
        supervised.train(recipe(), tmp_path / "file" / "run")
