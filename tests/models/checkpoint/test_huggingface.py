"""Folders of Hugging Face's transformers, with tiny random models."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
import torch
from torch.nn import functional as F

from bvit_interp.errors import CheckpointError, MissingExtra
from bvit_interp.models.checkpoint import class_names, load
from bvit_interp.models.looped import CalledSteps
from bvit_interp.results import weights_hash

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
VIEW = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.1],
    "resample": 3,
    "size": {"height": 32, "width": 32},
}


@pytest.fixture
def library():
    return pytest.importorskip("transformers")


@pytest.fixture
def saved(library, tmp_path):
    """Folder of a classifier and the model itself."""
    labels = {0: "cat", 1: "dog", 2: "owl"}
    config = library.ViTConfig(**SIZE, id2label=labels, label2id={v: k for k, v in labels.items()})
    torch.manual_seed(0)
    model = library.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(VIEW))
    return tmp_path / "vit", model


def test_a_classifier(saved):
    folder, own = saved
    model = load(f"hf:{folder}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), own(images).logits)
    assert isinstance(model, CalledSteps)
    assert len(model.blocks) == 3
    assert model.layout.prefix == ("cls",)
    assert class_names(model) == ["cat", "dog", "owl"]
    assert model.pretrained_cfg == {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.1),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "label_names": ["cat", "dog", "owl"],
    }
    assert weights_hash(model) == weights_hash(load(f"hf:{folder}"))


def test_a_pickle_of_weights(saved):
    folder, own = saved
    torch.save(own.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = load(f"hf:{folder}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), own(images).logits)


def test_many_classes_stay_in_order(library, tmp_path):
    names = [f"class {i}" for i in range(12)]
    model = library.ViTForImageClassification(
        library.ViTConfig(**SIZE, id2label=dict(enumerate(names)))
    )
    model.save_pretrained(tmp_path)
    assert class_names(load(f"hf:{tmp_path}")) == names


def test_code_of_the_folder_never_runs(library, tmp_path):
    proof = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"import pathlib; pathlib.Path({str(proof)!r}).touch()")
    config = {
        "model_type": "mine",
        "architectures": ["MineForImageClassification"],
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForImageClassification": "mine.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot open it"):
        load(f"hf:{tmp_path}")
    assert not proof.exists()


class Code:
    def __reduce__(self):
        return (sys.exit, (3,))


def test_code_in_a_pickle_is_refused(saved):
    folder, own = saved
    torch.save({**own.state_dict(), "x": Code()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot open it") as caught:
        load(f"hf:{folder}")
    assert "\n" not in str(caught.value)


def test_another_size(saved):
    folder, own = saved
    model = load(f"hf:{folder}@size=48x32")
    positions = own.vit.embeddings.position_embeddings.detach()
    grid = positions[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 4), mode="bicubic", antialias=True).flatten(2).mT
    wanted = torch.cat([positions[:, :1], grid], 1)
    found = model.model.vit.embeddings.position_embeddings.detach()
    torch.testing.assert_close(found, wanted)
    assert model.layout.grid == (6, 4)
    assert model(torch.zeros(1, 3, 48, 32)).shape == (1, 3)
    with pytest.raises(CheckpointError, match="not whole patches of 8 x 8"):
        load(f"hf:{folder}@size=36")


def test_features_at_the_size_of_the_preprocessor(library, tmp_path):
    model = library.Dinov2Model(library.Dinov2Config(**SIZE))
    model.save_pretrained(tmp_path / "dino")
    view = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
    view["size"] = {"shortest_edge": 32}
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(view))
    opened = load(f"hf:{tmp_path / 'dino'}")
    assert opened.layout.image_size == (24, 24)
    assert opened.num_classes == 0
    assert opened.pretrained_cfg == {"crop_pct": 0.75}  # LABEL_0 is no name
    assert class_names(opened) is None
    assert load(f"hf:{tmp_path / 'dino'}@size=40").layout.grid == (5, 5)


def test_keys_that_do_not_fit_are_listed(saved):
    from safetensors.torch import load_file, save_file

    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"does not fit the model\. missing: classifier\.bias"
    ):
        load(f"hf:{folder}")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config\.json: not JSON"),
        ("config.json", "[]", r"config\.json: not a mapping"),
        ("config.json", "{}", "no model_type"),
        ("config.json", '{"model_type": "none"}', "transformers cannot open it"),
        ("preprocessor_config.json", '{"image_mean": [1]}', r"not understood \(KeyError"),
        ("preprocessor_config.json", '{"resample": 9}', r"not understood \(IndexError"),
        ("model.safetensors", "short", "transformers cannot open it"),
    ],
)
def test_damaged_folders_are_one_line(saved, file, text, message):
    folder, _ = saved
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(f"hf:{folder}")
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_of_transformers(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no config\.json in google/vit; hf: takes a folder"):
        load("hf:google/vit")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match=rf"say hf:{tmp_path}"):
        load(tmp_path)


def test_without_the_library_it_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"bvit-interp\[huggingface\]"):
        load(f"hf:{tmp_path}")
