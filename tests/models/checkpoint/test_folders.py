"""Saving and opening models: round trips, damage, and files that must not be trusted."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError

from bvit_interp.errors import CheckpointError
from bvit_interp.models.checkpoint import class_names, display_name, load, save
from bvit_interp.models.checkpoint.weights import fill, read

TIMM_NAME = "vit_tiny_patch16_224"


@pytest.fixture
def saved(tiny, tmp_path):
    """Folder of a saved tiny model."""
    return save(tiny, tmp_path / "tiny")


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    file.write_text(json.dumps(config))


# ---- round trips ---------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "te": {"name": "bvit_small_te_patch16_224"},
    "reg4": {"name": "bvit_small_reg4_patch16_224"},
    "cycle": {"num_blocks": 2, "num_steps": 3},
    "repeat": {"num_blocks": 2, "num_steps": 3, "order": "repeat"},
    "stack": {"name": "vit_rms_small_patch16_224", "num_blocks": 3},
    "grey": {"in_chans": 1, "img_size": (48, 32)},
    "dynamic": {"dynamic_img_size": True},
    "average pooling": {"global_pool": "avg"},
    "wide": {"mlp_ratio": 2.0, "num_classes": 3},
}


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_is_bit_equal(make, tmp_path, kwargs):
    model = make(**kwargs)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    again = load(save(model, tmp_path / "model"))
    assert torch.equal(again(images), model(images))
    assert not again.training
    assert [k for k, _ in again.named_parameters()] == [k for k, _ in model.named_parameters()]
    through_timm = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(through_timm(images), model(images))
    assert torch.equal(load(save(through_timm, tmp_path / "again"))(images), model(images))


CHANGES = {
    "another head": lambda model: model.reset_classifier(3),
    "no head": lambda model: model.reset_classifier(0),
    "average pooling": lambda model: model.reset_classifier(10, "avg"),
    "larger images": lambda model: model.set_input_size(img_size=(64, 48)),
    "smaller patches": lambda model: model.set_input_size(patch_size=4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_changed_after_creation_opens_as_it_is(tiny_reg4, tmp_path, change):
    change(tiny_reg4)
    images = torch.randn(2, 3, *tiny_reg4.patch_embed.img_size)
    assert torch.equal(load(save(tiny_reg4, tmp_path / "model"))(images), tiny_reg4(images))


def test_a_cut_model_is_refused_rather_than_opened_with_all_its_steps(tiny, tmp_path):
    tiny.prune_intermediate_layers([3], prune_head=False)
    with pytest.raises(CheckpointError, match="has 4 steps but was made with 12"):
        save(tiny, tmp_path / "cut")
    assert not list(tmp_path.iterdir())


def test_a_model_with_foreign_parts_is_refused(tiny, tmp_path):
    tiny.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"unexpected: extra\.bias, extra\.weight"):
        save(tiny, tmp_path / "grafted")


def test_a_model_made_without_its_name_is_refused(tmp_path):
    from bvit_interp.models.bvit import BViT

    with pytest.raises(CheckpointError, match=r"timm\.create_model"):
        save(BViT(embed_dim=32, num_heads=4, img_size=32), tmp_path / "nameless")


def test_other_models_are_refused(stacked, tmp_path):
    with pytest.raises(CheckpointError, match="only a BViT is saved here, got VisionTransformer"):
        save(stacked, tmp_path / "stack")


def test_what_is_in_the_folder(tiny, tmp_path):
    folder = save(tiny, tmp_path / "deep" / "tiny", card="# Tiny\n", about={"seed": 3})
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (folder / "README.md").read_text() == "# Tiny\n"
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "bvit_small_patch16_224"
    assert config["training"] == {"seed": 3}
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    weights = safetensors.torch.load_file(str(folder / "model.safetensors"))
    assert len(weights) == 17
    assert {k.split(".")[1] for k in weights if k.startswith("blocks")} == {"0"}


def test_timm_preprocesses_for_the_size_that_was_saved(saved):
    config = timm.data.resolve_model_data_config(load(saved))
    assert tuple(config["input_size"]) == (3, 32, 32)


def test_class_names_and_normalisation_travel(tiny, tmp_path):
    assert class_names(tiny) is None
    tiny.pretrained_cfg.update(
        label_names=[*"abcdefghij"], mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3)
    )
    again = load(save(tiny, tmp_path / "named"))
    assert class_names(again) == [*"abcdefghij"]
    assert tuple(again.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert tuple(again.pretrained_cfg["std"]) == (0.1, 0.2, 0.3)


def test_a_weights_file_beside_its_config_opens(tiny, saved, images):
    assert torch.equal(load(saved / "model.safetensors")(images), tiny(images))
    torch.save(tiny.state_dict(), saved / "other.pth")
    assert torch.equal(load(str(saved / "other.pth"))(images), tiny(images))


def test_display_names(saved, monkeypatch):
    assert display_name(saved) == "tiny"
    monkeypatch.chdir(saved)
    assert display_name(".") == "tiny"
    assert display_name("timm:vit_tiny_patch16_224@random") == "vit_tiny_patch16_224@random"


# ---- failing while saving ------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# safetensors 0.8 raises its own for a full disk
@pytest.mark.parametrize("raised", [OSError, SafetensorError])
def test_a_full_disk_leaves_the_old_checkpoint(saved, make, monkeypatch, raised):
    def write_half(weights, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise raised(os.strerror(errno.ENOSPC))

    before = contents(saved)
    monkeypatch.setattr(safetensors.torch, "save_file", write_half)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        save(make(seed=5), saved)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["tiny"]


def test_a_card_that_cannot_be_written_leaves_nothing(tiny, tmp_path):
    with pytest.raises(TypeError):
        save(tiny, tmp_path / "new", about={"seed": object()})  # not JSON
    with pytest.raises(UnicodeEncodeError):
        save(tiny, tmp_path / "new", card="\ud800")
    assert not list(tmp_path.iterdir())


def test_an_existing_checkpoint_is_replaced_and_other_files_stay(saved, make, images):
    (saved / "notes.txt").write_text("mine")
    other = make(seed=5)
    save(other, saved)
    assert torch.equal(load(saved)(images), other(images))
    assert (saved / "notes.txt").read_text() == "mine"
    assert [path.name for path in saved.parent.iterdir()] == ["tiny"]


# ---- damaged and wrong checkpoints ---------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights(saved, kept):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: truncated or not a safetensors file"
    ):
        load(saved)


def test_missing_pieces(saved, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at .*nowhere: give a folder, a weights file"
    ):
        load(tmp_path / "nowhere")
    (saved / "config.json").rename(tmp_path / "config")
    with pytest.raises(CheckpointError, match=r"has no config\.json$"):
        load(saved)
    with pytest.raises(CheckpointError, match=r"say timm:NAME@.*model\.safetensors"):
        load(saved / "model.safetensors")
    (tmp_path / "config").rename(saved / "config.json")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights file at .*model\.safetensors"):
        load(saved)


@pytest.mark.parametrize(
    "text",
    [b"{", b"", b"[]", b"{}", b"null", b"\xff\xfe\xfa", b'{"architecture": "x", "model_args": 3}'],
)
def test_bad_json(saved, text):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json: (not|model_args must be a mapping)"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "close"), [("bvit_smal_patch16_224", "small"), (None, "base"), (3, "base")]
)
def test_unknown_architecture(saved, name, close):
    edit_config(saved, architecture=name)
    with pytest.raises(
        CheckpointError, match=rf"unknown architecture .*; close: .*bvit_{close}_patch16_224"
    ):
        load(saved)


@pytest.mark.parametrize(
    "args",
    [
        {"colour": "red"},
        {"num_heads": 5},
        {"order": "up"},
        {"norm_layer": "no_such_norm"},
    ],
    ids=str,
)
def test_arguments_that_build_no_model(saved, args):
    edit_config(saved, model_args=args)
    with pytest.raises(
        CheckpointError, match=r"config\.json: bvit_small_patch16_224 cannot be built"
    ):
        load(saved)


@pytest.mark.parametrize("overlay", [None, 3, "text"])
def test_pretrained_cfg_of_another_type(saved, overlay):
    edit_config(saved, pretrained_cfg=overlay)
    with pytest.raises(CheckpointError, match="pretrained_cfg must be a mapping"):
        load(saved)


def test_a_config_of_a_model_without_steps_is_refused(saved):
    (saved / "config.json").write_text('{"architecture": "resnet10t"}')
    weights = timm.create_model("resnet10t").state_dict()
    safetensors.torch.save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="tiny: no block of ResNet takes and gives tokens"):
        load(saved)


def test_keys_that_do_not_fit_are_listed(tiny, saved):
    weights = tiny.state_dict()
    weights["surplus.weight"] = torch.zeros(2)
    weights["head.bias"] = torch.zeros(7)
    del weights["norm.weight"]
    safetensors.torch.save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(saved)
    message = str(caught.value)
    assert "missing: norm.weight" in message
    assert "unexpected: surplus.weight" in message
    assert "of another shape: head.bias (7,) for (10,)" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny, tmp_path, value):
    with torch.no_grad():
        tiny.blocks[0].mlp.fc1.weight[3, 5] = value
    save(tiny, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight holds NaN or infinite"):
        load(tmp_path / "model")


# ---- foreign files -------------------------------------------------------------------------------


class Malicious:
    """Unpickling this creates a folder, by a function of a module that torch blocks or of
    another."""

    def __init__(self, function, proof):
        self.function, self.proof = function, proof

    def __reduce__(self):
        return (self.function, (self.proof,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("function", [os.mkdir, Path.mkdir, os.makedirs])
@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, protocol, function):
    proof, file = tmp_path / "proof", tmp_path / "evil.pth"
    if protocol is None:  # torch's zip
        torch.save(
            {"state_dict": {"w": torch.zeros(2)}, "payload": Malicious(function, proof)}, file
        )
    else:
        file.write_bytes(pickle.dumps({"payload": Malicious(function, proof)}, protocol))
    with pytest.raises(CheckpointError, match="it holds code, which is never run"):
        load(f"timm:{TIMM_NAME}@{file}")
    assert not proof.exists()
    torch.load(file, weights_only=False) if protocol is None else pickle.loads(file.read_bytes())
    assert proof.exists()  # the file would have done it


@pytest.fixture(scope="module")
def foreign():
    torch.manual_seed(3)
    return timm.create_model(TIMM_NAME).eval()


def test_a_training_checkpoint_of_timm_opens(foreign, tmp_path):
    """timm and DeiT training scripts store an argparse.Namespace beside the weights."""
    file = tmp_path / "last.pth.tar"
    args = argparse.Namespace(lr=1e-3, model=TIMM_NAME, aa=None)
    torch.save(
        {"epoch": 3, "arch": TIMM_NAME, "state_dict": foreign.state_dict(), "args": args}, file
    )
    model = load(f"timm:{TIMM_NAME}@{file}")
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(images), foreign(images))


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), {"epoch": 3}, [1, 2], {0: torch.zeros(2)}, {None: torch.zeros(2)}],
    ids=["tensor", "no weights", "list", "numbers", "None"],
)
def test_a_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no state dict inside"):
        fill(torch.nn.Linear(2, 2), read(tmp_path / "w.pt"), tmp_path / "w.pt", "w.pt")


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_checkpoint(tmp_path, data):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or no checkpoint"):
        read(tmp_path / "w.pth")


def test_a_foreign_file_of_another_model(foreign, tmp_path):
    torch.save(foreign.state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(
        CheckpointError, match=r"does not fit the model\. of another shape: .*blocks\.0"
    ):
        load(f"timm:vit_small_patch16_224@{tmp_path / 'tiny.pth'}")


def test_random_weights_are_the_same_every_time_and_leave_the_generators(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were reseeded")
    )
    state = torch.get_rng_state()
    first = load(f"timm:{TIMM_NAME}@random")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = load(f"timm:{TIMM_NAME}@random")
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert first.head.weight.std() > 0


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("vit_tny_patch16_224", "vit_tiny_patch16_224"),
        ("bvit_bse_patch16_224", "bvit_base_patch16_224"),
        ("zzz", "bvit_"),
    ],
)
def test_an_unknown_timm_name_suggests_close_ones(name, close):
    with pytest.raises(CheckpointError, match=f"timm has no model '{name}'; close: .*{close}"):
        load(f"timm:{name}")


def test_a_timm_model_without_steps_is_refused():
    with pytest.raises(CheckpointError, match="timm:resnet10t@random: no block of ResNet"):
        load("timm:resnet10t@random")


def test_weights_that_cannot_be_had_say_what_works_offline():
    with pytest.raises(
        CheckpointError, match=r"timm:bvit_small_patch16_224@random or .*@FILE work offline"
    ):
        load("timm:bvit_small_patch16_224")  # no weights are published: timm warns and would go on
