"""Weights as trainers leave them: wrapped in mappings and prefixes, beside averaged ones."""

from __future__ import annotations

import argparse
import copy
import logging
import re

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bvit_interp.errors import CheckpointError
from bvit_interp.models.checkpoint import load, save
from bvit_interp.models.checkpoint.weights import _fits
from bvit_interp.models.looped import CalledSteps

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Wrapped(nn.Module):
    """What DDP makes of names, without processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Lit(nn.Module):
    """A Lightning module: the model beside a loss with parameters of its own."""

    def __init__(self, model, name="model"):
        super().__init__()
        setattr(self, name, model)
        self.criterion = nn.Linear(2, 1)


def compiled_blocks(model):
    """Every block compiled on its own."""
    model = copy.deepcopy(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return model


WRAPPERS = {
    "plain": (lambda m: m, None),
    "DDP": (Wrapped, "stripped module. from"),
    "compiled": (torch.compile, "stripped _orig_mod. from"),
    "DDP of compiled": (lambda m: Wrapped(torch.compile(m)), "stripped module. and _orig_mod."),
    "compiled DDP": (lambda m: torch.compile(Wrapped(m)), "stripped module. and _orig_mod."),
    "compiled blocks": (compiled_blocks, "stripped _orig_mod. from"),
    "Lightning": (Lit, r"stripped model\. from .*left out 2 other tensors \(criterion"),
    "Lightning net": (lambda m: Lit(m, "net"), r"stripped net\. from"),
    "Lightning of all": (
        lambda m: Lit(Wrapped(torch.compile(m)), "vit"),
        r"stripped vit\.module\. ",
    ),
    "averaged": (AveragedModel, "stripped module. from .*took weights that are averaged"),
    "averaged DDP": (lambda m: AveragedModel(Wrapped(m)), "module.module. from .*averaged"),
}


@pytest.fixture
def made():
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **SIZE, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A folder with the config alone."""
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "patch_size": 8,'
        ' "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}}'
    )
    return tmp_path


def other(model):
    """A state dict of the same names and shapes with other numbers."""
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


def equal(model, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_seen_by_what_fits(made, folder, caplog, kind, wrapper):
    wrap, said = WRAPPERS[kind]
    weights = wrap(made).state_dict()
    optimizer = {"state": {0: {"step": torch.zeros(1)}}, "param_groups": []}
    whole = {wrapper: weights, "epoch": 3, "optimizer": optimizer} if wrapper else weights
    torch.save(whole, folder / "w.ckpt")
    opened = load(folder / "w.ckpt")
    assert equal(opened, made.state_dict())
    if said is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert caplog.messages[0].startswith(f"{folder / 'w.ckpt'}: ")
        assert "\n" not in caplog.messages[0]
        assert re.search(said, caplog.messages[0])


def test_names_that_are_the_models_own_stay():
    """A model whose own names begin with `module.` fits as it is."""
    model, weights = Wrapped(nn.Linear(2, 2)), Wrapped(nn.Linear(2, 2)).state_dict()
    (found,) = _fits(model.state_dict(), (), weights)
    assert (found.prefix, found.inner, found.others) == ("", (), ())


def test_a_safetensors_file_of_a_compiled_model(made, folder):
    weights = {f"_orig_mod.{name}": each for name, each in made.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "w.safetensors")
    assert equal(load(folder / "w.safetensors"), made.state_dict())


@pytest.mark.parametrize(
    "content",
    [
        lambda m: {"state_dict": m.state_dict(), "state_dict_ema": other(m)},
        lambda m: {"state_dict": Wrapped(m).state_dict(), "state_dict_ema": other(m)},
        lambda m: {"model": m.state_dict(), "model_ema": other(m)},
        lambda m: {"model": m.state_dict(), "ema": {"model": other(m), "decay": 0.9}},
        lambda m: {
            "state_dict": {
                **{f"model.{name}": each for name, each in m.state_dict().items()},
                **{f"averaged.module.{name}": each for name, each in other(m).items()},
                "averaged.n_averaged": torch.tensor(3),
            }
        },
    ],
    ids=["timm", "timm DDP", "DeiT", "nested", "Lightning"],
)
def test_raw_weights_are_taken_unless_averaged_ones_are_asked_for(made, folder, caplog, content):
    file = folder / "model_best.pth.tar"
    torch.save({**content(made), "args": argparse.Namespace(lr=0.1), "arch": "x"}, file)
    assert equal(load(file), made.state_dict())
    assert f"took the raw weights; {file}@ema takes the averaged ones" in caplog.messages[0]
    caplog.clear()
    assert equal(load(f"{file}@ema"), other(made))
    assert "took weights that are averaged over training" in caplog.messages[0]
    assert "left out" not in caplog.messages[0]


def test_weights_of_timm_by_its_name(folder, caplog):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    file = folder / "last.pth.tar"
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": other(model)}, file)
    assert equal(load(f"timm:vit_tiny_patch16_224@{file}"), model.state_dict())
    assert f"timm:vit_tiny_patch16_224@{file}@ema takes the averaged" in caplog.messages[0]
    assert equal(load(f"timm:vit_tiny_patch16_224@{file}@ema"), other(model))


def test_a_file_without_averaged_weights(made, folder):
    torch.save({"state_dict": made.state_dict()}, folder / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth has no averaged weights: leave out @ema"):
        load(f"{folder / 'w.pth'}@ema")


def test_several_sets_that_fit_are_named(made, folder):
    torch.save({"student": made.state_dict(), "teacher": other(made)}, folder / "w.pth")
    with pytest.raises(CheckpointError, match=r"several sets .* \(student, teacher\)"):
        load(folder / "w.pth")
    torch.save({"model": made.state_dict(), "teacher": other(made)}, folder / "w.pth")
    assert equal(load(folder / "w.pth"), made.state_dict())


def test_what_does_not_fit_is_listed_by_the_models_names(made, folder):
    weights = {f"model.{name}": each for name, each in made.state_dict().items()}
    del weights["model.norm.weight"]
    weights["model.head.bias"] = torch.zeros(7)
    weights["model.surplus"] = torch.zeros(7)
    torch.save({"state_dict": weights}, folder / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load(folder / "w.pth")
    for part in (
        "missing: norm.weight;",
        "unexpected: surplus;",
        "of another shape: head.bias (7,) for (5,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [lambda t: t.to("meta"), lambda t: t.to_sparse()],
    ids=["meta", "sparse"],
)
def test_tensors_without_plain_values(made, folder, change):
    weights = made.state_dict()
    weights["norm.weight"] = change(weights["norm.weight"])
    torch.save(weights, folder / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: norm\.weight is a meta, sparse or"):
        load(folder / "w.pth")


@pytest.mark.parametrize("key", [0, None, (1, 2)])
def test_keys_that_are_no_names(made, folder, key):
    torch.save({**made.state_dict(), key: torch.zeros(2)}, folder / "w.pth")
    with pytest.raises(CheckpointError, match="no state dict inside"):
        load(folder / "w.pth")


def test_bvit_weights_from_a_trainer_of_others(tiny, tmp_path, images):
    folder = save(tiny, tmp_path / "tiny")
    torch.save({"state_dict": Lit(Wrapped(tiny)).state_dict()}, folder / "w.ckpt")
    assert torch.equal(load(folder / "w.ckpt")(images), tiny(images))


def test_an_older_layout_is_converted_by_timm(folder, caplog):
    """Patch embeddings that are a linear layer, as ViTs of 2020 have them."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    weights = {**model.state_dict()}
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].flatten(1)
    torch.save(weights, folder / "old.pth")
    opened = load(f"timm:vit_tiny_patch16_224@{folder / 'old.pth'}")
    assert opened.patch_embed.proj.weight.shape == (192, 3, 16, 16)
    assert equal(opened, model.state_dict())
    assert "converted them" in caplog.messages[-1]


@pytest.mark.parametrize("prefix", ["", "model.module."])
def test_a_classifier_of_other_classes_comes_with_its_file(folder, prefix):
    """As after fine-tuning: the architecture has 1000 classes, the file 7."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    weights = {f"{prefix}{name}": each for name, each in model.state_dict().items()}
    torch.save({"state_dict": weights}, folder / "w.pth")
    opened = load(f"timm:vit_tiny_patch16_224@{folder / 'w.pth'}")
    assert opened.num_classes == 7
    assert equal(opened, model.state_dict())


def test_other_transformers_of_timm_are_unrolled():
    model = load("timm:eva02_tiny_patch14_224@random@size=56")
    assert isinstance(model, CalledSteps)
    assert model.layout.grid == (4, 4)
    assert len(model.blocks) == 12
