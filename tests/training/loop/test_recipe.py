"""Recipes: the shipped ones, types of settings, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError
from bvit_interp.models import cost
from bvit_interp.training.loop import build
from bvit_interp.training.loop.recipe import Recipe, available, read

SHIPPED = [
    "cifar10",
    "cifar10-d128",
    "cifar10-d128-pathways",
    "cifar10-d128-vit",
    "cifar10-pathways",
    "cifar10-reg4",
    "cifar10-te",
    "cifar10-vit",
    "digits-s",
    "digits-s-pathways",
    "digits-s-reg4",
    "digits-s-te",
    "imagenet-distilled",
    "imagenet-paper",
    "imagenette",
    "imagenette-d128",
    "imagenette-d128-vit",
    "imagenette-reg4",
    "imagenette-te",
    "imagenette-vit",
    "tickets-digits-s",
]

PAIRED = [
    name for name in SHIPPED if name.endswith(("-vit", "-te", "-reg4")) and "digits" not in name
]


def test_the_shipped_recipes_are_known():
    assert available() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_can_be_read_and_its_model_built(name):
    recipe = read(name)
    arguments = dict(recipe.model)
    with torch.device("meta"):
        model = timm.create_model(arguments.pop("name"), **arguments)
    assert hasattr(model, "set_distilled_training") == (recipe.teacher is not None)
    assert recipe.warmup_epochs < recipe.epochs


# by hand, width D, T tokens of position: patches (p*p*3 D + D), CLS and positions (1 + T) D, a
# block 12 D^2 + 11 D, the last norm D and the head D C + C
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar10", 48 * 256 + 256 + 66 * 256 + 12 * 256**2 + 11 * 256 + 256 + 256 * 10 + 10),
        ("cifar10-te", 821_514 + 12 * 256),
        ("cifar10-reg4", 821_514 + 4 * 256),
        ("cifar10-vit", 821_514 + 11 * (12 * 256**2 + 11 * 256)),
        ("cifar10-d128", 48 * 128 + 128 + 66 * 128 + 12 * 128**2 + 11 * 128 + 128 + 128 * 10 + 10),
        (
            "imagenet-paper",
            768 * 768 + 768 + 198 * 768 + 12 * 768**2 + 11 * 768 + 768 + 768 * 1000 + 1000,
        ),
    ],
)
def test_parameters_of_the_recipes_models(name, parameters):
    arguments = dict(read(name).model)
    with torch.device("meta"):
        model = timm.create_model(arguments.pop("name"), **arguments)
    assert cost.parameters(model) == parameters
    if name == "cifar10":
        assert parameters == 821_514


def test_the_papers_recipe_is_the_papers():
    """Section 4 and appendix H of arXiv 2605.10661, as far as they are printed."""
    recipe = read("imagenet-paper")
    printed = {
        "epochs": 300,
        "batch_size": 4 * 256,
        "weight_decay": 0.05,
        "warmup_epochs": 30,
        "warmup_factor": 0.033,
        "label_smoothing": 0.1,
        "ema": 0.99995,
        "crop": "random-resized",
        "flip": True,
    }
    assert {key: getattr(recipe, key) for key in printed} == printed
    assert recipe.erase > 0 and recipe.mixup > 0 and recipe.cutmix > 0 and recipe.randaugment
    assert "drop_path_rate" not in recipe.model
    distilled = read("imagenet-distilled")
    assert distilled.teacher == "torchvision:regnet_y_16gf"
    assert {**vars(recipe), "model": 0, "teacher": 0} == {
        **vars(distilled),
        "model": 0,
        "teacher": 0,
    }


def test_extending():
    base, te = read("digits-s"), read("digits-s-te", ["lr=0.01", "model.embed_dim=64"])
    assert te.model == {**base.model, "name": "bvit_small_te_patch16_224", "embed_dim": 64}
    assert te.lr == 0.01
    assert te.batch_size == base.batch_size


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_is_trained_alike(name):
    """All that differs is the name of the model; those of digits-s start from a trained one."""
    base, other = read(name.rpartition("-")[0]), read(name)
    assert {**vars(other), "model": {**other.model, "name": base.model["name"]}} == vars(base)
    assert other.model["name"] != base.model["name"]


def test_patches_are_left_out_until_a_share_of_the_epochs(recipe):
    plan = recipe(epochs=10, patch_drop_until=0.67, model={"patch_drop_rate": 0.5})
    assert [plan.patch_drop(epoch) for epoch in range(10)] == [0.5] * 7 + [0.0] * 3
    assert recipe(epochs=2, model={"patch_drop_rate": 0.5}).patch_drop(1) == 0.5
    assert recipe(epochs=2, patch_drop_until=0, model={"patch_drop_rate": 0.5}).patch_drop(0) == 0
    assert recipe(epochs=2).patch_drop(0) == 0
    with pytest.raises(UserError, match=r"patch_drop_until must be in 0\.\.1, got 1\.5"):
        recipe(patch_drop_until=1.5)


def test_hardness(recipe):
    easy = recipe(easy_epochs=2, fade_epochs=4)
    assert [easy.hardness(epoch) for epoch in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [recipe(easy_epochs=2).hardness(epoch) for epoch in range(4)] == [0, 0, 1, 1]
    assert [recipe().hardness(epoch) for epoch in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"workers": 3}, True),
        ({"score_every": 5}, True),
        ({"data": "cifar10:/elsewhere"}, True),
        ({"data": "cifar100:/somewhere"}, False),
        ({"model": {"name": "x", "embed_dim": 1}}, False),
        ({"seed": 1}, False),
        ({"lr": 2.0}, False),
    ],
)
def test_what_a_run_must_share_to_be_continued(change, free):
    settings = {"model": {"name": "x"}, "data": "cifar10:/somewhere", "epochs": 2}
    assert (
        Recipe(**settings).resume_key() == Recipe(**{**settings, **change}).resume_key()
    ) is free


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
        ("clip=null", "clip", None),
        ("randaugment=rand-m9-mstd0.5-inc1", "randaugment", "rand-m9-mstd0.5-inc1"),
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
    with pytest.raises(UserError, match=r"mine\.yaml: clip must be a number or null, got 'tight'"):
        read(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr=abc"], "recipe digits-s: lr must be a number, got 'abc'"),
        (["lr=.nan"], "lr must be a number, got nan"),
        (["lr=true"], "lr must be a number, got True"),
        (["lr=-1"], "lr must be >= 0, got -1"),
        (["fade_epochs=-1"], "fade_epochs must be >= 0, got -1"),
        (["ema=1.5"], "ema must be in 0..1, got 1.5"),
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
        (["epochs=1e12"], "epochs must be <= 1000000, got 1000000000000"),
        (["images_per_epoch=1e11"], "images_per_epoch must be <= 100000000"),
        (["batch_size=1e12"], "batch_size must be <= 65536"),
        (["seed=1e30"], "seed must be <= "),
        (["workers=1000"], "workers must be <= 256"),
        (["lr=1e300"], "lr must be <= 1000000"),
        (["batch_size=64000"], "less than a batch"),
        (["autocast=fp8"], "autocast must be auto, bf16, off"),
        (["positions=rope"], "positions must be random, sincos"),
        (["crop=random"], "crop must be none, padded, random-resized, got 'random'"),
        (["schedule=linear"], "schedule must be step, epoch"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        read("digits-s", settings)


def test_bad_recipe_files(tmp_path):
    with pytest.raises(UserError, match="no recipe 'imagenet'; shipped: cifar10, cifar10-d128"):
        read("imagenet")
    file = tmp_path / "bad.yaml"
    for text in ("a: [", "- 1", "model: x"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml: not"):
            read(str(file))
    for text, message in (
        (f"extends: {file}", "extends itself"),
        ("extends: [a]", "no recipe"),
        ("lr: 1", "data, epochs must be given"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read(str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 7}, r"cannot make the model bvit_small_patch16_224 \(.*num_heads=7.*\): "),
        ({"num_heads": 0}, "cannot make the model .*num_heads=0"),
        ({"norm_layer": "none"}, "cannot make the model .*norm_layer=none"),
        ({"name": "nonsense"}, r"cannot make the model nonsense \(.*\): .*nonsense"),
        ({"name": 3}, "cannot make the model 3 "),
        ({"speed": 3}, "cannot make the model .*speed"),
        ({"img_size": "big"}, "cannot make the model .*img_size=big"),
        ({"name": "vit_tiny_patch16_224", "num_steps": None}, "vit_tiny_patch16_224"),
        (
            {"name": "vit_tiny_patch16_224", "num_steps": 3},
            "cannot make the model vit_tiny_patch16_224",
        ),
        ({"num_classes": 11}, "model.num_classes is 11, the data has 10 classes"),
        ({"in_chans": 1}, "model.in_chans is 1, images have 3"),
    ],
)
def test_a_model_that_cannot_be_made(recipe, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build.make_model(recipe(model=arguments), DigitScenes("train"))
    assert "\n" not in str(error.value)
