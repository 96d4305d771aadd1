"""The small trainer: it learns, writes a checkpoint that opens, and stops on NaN with the last good one kept."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import load, save
from bvit_interp.training import supervised
from bvit_interp.training.recipe import Recipe, available, read

SMALL = {
    "model": {"name": "bvit_small_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2,
              "num_steps": 3, "num_classes": 10, "weight_init": "jax"},
    "data": "digits-s", "epochs": 2, "images_per_epoch": 64, "batch_size": 16, "warmup_steps": 4, "autocast": "off",
}  # fmt: skip


@pytest.mark.slow
def test_a_run_leaves_a_checkpoint_a_history_and_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(supervised, "TEST_IMAGES", 40)
    model = supervised.train(Recipe(**SMALL), tmp_path / "run")
    again = load(tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    assert again.pretrained_cfg["label_names"] == list(DigitScenes.classes)
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert list(history) == list(supervised.COLUMNS)
    assert history["epoch"].tolist() == [1, 2]
    test = supervised.render(DigitScenes("test", length=40))
    assert supervised.evaluate(again, test)["accuracy"] == pytest.approx(history["accuracy"].iloc[-1])
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{100 * history['accuracy'].iloc[-1]:.1f} %" in card

    same = supervised.train(Recipe(**SMALL), tmp_path / "same")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.slow
def test_nan_stops_with_the_epoch_named_and_the_last_weights_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(supervised, "TEST_IMAGES", 20)
    recipe = Recipe(**SMALL)
    original, calls = supervised.F.cross_entropy, []

    def poisoned(logits, target):
        calls.append(1)
        return original(logits, target) * (torch.nan if len(calls) > 6 else 1)

    monkeypatch.setattr(supervised.F, "cross_entropy", poisoned)
    with pytest.raises(UserError, match="the loss is nan in epoch 2, step 2"):
        supervised.train(recipe, tmp_path / "run")
    load(tmp_path / "run")


def test_starting_from_a_checkpoint(make, tmp_path):
    base = make(patch_size=4)
    folder = save(base, tmp_path / "base")
    for name, new in (("bvit_small_te_patch16_224", "blocks.step_embed"), ("bvit_small_reg4_patch16_224", "reg_token")):
        arguments = {"name": name, "img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 4, "num_classes": 10}
        model = supervised._start(Recipe(**{**SMALL, "model": arguments, "init": str(folder)})).eval()
        own = model.state_dict()
        assert set(own) - set(base.state_dict()) == {new}
        assert all(torch.equal(own[key], tensor) for key, tensor in base.state_dict().items())
        if new == "blocks.step_embed":  # it starts at zero: the very same model
            images = torch.randn(2, 3, 32, 32)
            assert torch.equal(model(images), base(images))
    wide = {**arguments, "embed_dim": 64}
    with pytest.raises(UserError, match="does not fit the model: cls_token"):
        supervised._start(Recipe(**{**SMALL, "model": wide, "init": str(folder)}))


def test_sincos_positions():
    """Row r, column c: the first half of the width is of the one coordinate, the second of the other."""
    model = supervised._start(Recipe(**{**SMALL, "positions": "sincos"}))
    positions = model.pos_embed[0, 1:].reshape(4, 4, 32)
    assert positions.abs().max() <= 1
    same_row = torch.isclose(positions[1, 0], positions[1, 3]).float().mean()
    same_column = torch.isclose(positions[0, 1], positions[3, 1]).float().mean()
    assert same_row == pytest.approx(0.5, abs=0.1)
    assert same_column == pytest.approx(0.5, abs=0.1)
    assert len(torch.unique(positions.reshape(16, 32).round(decimals=4), dim=0)) == 16


def test_accuracy_and_loss_against_numpy(make):
    model = make(patch_size=8)
    images = supervised.render(DigitScenes("test", length=30))
    found = supervised.evaluate(model, images, batch_size=7)
    mean, std = (np.array(model.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = torch.tensor((images[0] / 255.0 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(pixels).double().numpy()
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == images[1]).mean())
    log_likelihood = logits[np.arange(30), images[1]] - np.log(np.exp(logits).sum(1))
    assert found["test_loss"] == pytest.approx(-log_likelihood.mean(), rel=1e-4)


def test_learning_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(**{**SMALL, "warmup_steps": 4})
    factors = [supervised._lr_factor(step, recipe) for step in range(recipe.total_steps + 1)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[6] == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / 4)))
    assert factors[8] == pytest.approx(0.0)


def test_weight_decay_is_on_matrices_only(tiny_te):
    decayed, free = supervised._weight_decay_groups(tiny_te, 0.05)
    names = {id(parameter): name for name, parameter in tiny_te.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "patch_embed.proj.weight", "head.weight",
        *(f"blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }  # fmt: skip
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_recipes():
    assert available() == ["digits-s", "digits-s-reg4", "digits-s-te"]
    base, te = read("digits-s"), read("digits-s-te", ["lr=0.01", "model.embed_dim=64"])
    assert te.model == {**base.model, "name": "bvit_small_te_patch16_224", "embed_dim": 64}
    assert te.lr == 0.01
    assert te.batch_size == base.batch_size
    easy = Recipe(**SMALL, easy_epochs=2, fade_epochs=4)
    assert [easy.hardness(epoch) for epoch in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("lr=1e-3", "lr", 0.001),  # text for YAML 1.1
        ("lr=1", "lr", 1.0),
        ("epochs=2.0", "epochs", 2),
        ("images_per_epoch=1e3", "images_per_epoch", 1000),
        ("seed=9007199254740993", "seed", 9007199254740993),
        ("autocast=off", "autocast", "off"),  # false for YAML 1.1
        ("compile=true", "compile", True),
        ("init=null", "init", None),
        ("init=base", "init", "base"),
    ],
)
def test_settings_take_the_type_of_their_field(setting, field, value):
    found = getattr(read("digits-s", [setting]), field)
    assert found == value
    assert type(found) is type(value)


def test_a_recipe_file_takes_the_types_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: digits-s\nlr: 3e-4\nautocast: off\n")
    recipe = read(str(tmp_path / "mine.yaml"))
    assert (recipe.lr, recipe.autocast) == (0.0003, "off")
    (tmp_path / "mine.yaml").write_text("extends: digits-s\nclip: tight\n")
    with pytest.raises(UserError, match=r"mine\.yaml: clip must be a number, got 'tight'"):
        read(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 7}, r"cannot make the model bvit_small_patch16_224 \(.*num_heads=7.*\): "),
        ({"name": "nonsense"}, r"cannot make the model nonsense \(.*\): .*nonsense"),
        ({"name": 3}, "cannot make the model 3 "),
        ({"speed": 3}, "cannot make the model .*speed"),
        ({"img_size": "big"}, "cannot make the model .*img_size=big"),
        ({"name": "vit_tiny_patch16_224", "num_steps": None}, "vit_tiny_patch16_224"),
    ],
)
def test_a_model_that_cannot_be_made(arguments, message):
    recipe = Recipe(**{**SMALL, "model": {**SMALL["model"], **arguments}})
    with pytest.raises(UserError, match=message) as error:
        supervised._start(recipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr=abc"], "recipe digits-s: lr must be a number, got 'abc'"),
        (["lr=.nan"], "lr must be a number, got nan"),
        (["lr=true"], "lr must be a number, got True"),
        (["epochs=x"], "epochs must be a whole number, got 'x'"),
        (["epochs=1.5"], "epochs must be a whole number, got 1.5"),
        (["epochs=null"], "epochs must be a whole number, got None"),
        (["compile=1"], "compile must be true or false, got 1"),
        (["data=7"], "data must be text, got 7"),
        (["init=7"], "init must be text or null, got 7"),
        (["model=big"], "model must be a mapping, got 'big'"),
        (["model=big", "model.num_heads=2"], "model must be a mapping, got 'big'"),
        (["lr=["], r"--set lr: not YAML: '\['"),
        (["lr"], "--set takes key=value"),
        (["speed=3"], "unknown setting speed; settings: model, data, init"),
        (["epochs=0"], "epochs must be >= 1"),
        (["batch_size=99999"], "less than a batch"),
        (["autocast=fp8"], "autocast must be bf16 or off"),
        (["positions=rope"], "positions must be random or sincos"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        read("digits-s", settings)


def test_bad_recipe_files(tmp_path):
    with pytest.raises(UserError, match="no recipe 'imagenet'; shipped: digits-s"):
        read("imagenet")
    for text in ("a: [", "- 1", "model: x"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml: not"):
            read(str(tmp_path / "bad.yaml"))
