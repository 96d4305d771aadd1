"""A checkpoint's config: the layouts that are read, and values of the wrong type, range or size."""

from __future__ import annotations

import json
import math

import pytest
import timm
from safetensors.torch import save_file

from bvit_interp.errors import CheckpointError
from bvit_interp.models.checkpoint import class_names, load, save
from bvit_interp.models.checkpoint.config import check_args, checked_cfg, read_config

TEN = [*"abcdefghij"]


@pytest.fixture
def saved(tiny, tmp_path):
    """Folder of a saved tiny model with ten classes."""
    return save(tiny, tmp_path / "tiny")


def change(folder, part, key, value):
    """Write one value into `model_args`, `pretrained_cfg`, or (None) beside them."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    (config[part] if part else config)[key] = value
    file.write_text(json.dumps(config))


# ---- layouts -------------------------------------------------------------------------------------


def test_names_and_number_of_classes_beside_the_cfg_hold(saved):
    """`timm.models.save_for_hf` writes them there."""
    change(saved, "pretrained_cfg", "label_names", TEN[::-1])
    change(saved, None, "label_names", TEN)
    assert class_names(load(saved)) == TEN


def test_a_folder_that_timm_wrote_for_the_hub(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2,
        num_classes=3,
    )  # fmt: skip
    timm.models.save_for_hf(
        model,
        tmp_path / "hub",
        model_config={"num_classes": 3, "label_names": ["x", "y", "z"]},
        model_args={
            "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2,
        },
        safe_serialization=True,
    )  # fmt: skip
    opened = load(tmp_path / "hub")
    assert opened.num_classes == 3  # model_args does not say it
    assert class_names(opened) == ["x", "y", "z"]


def test_one_flat_mapping_as_on_the_hub_of_2022(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 2,
        "num_features": 192,
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "labels": ["dog", "cat"],
    }
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = load(tmp_path)
    cfg = opened.pretrained_cfg
    assert class_names(opened) == ["dog", "cat"]
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bilinear", 0.95)


def test_a_byte_order_mark_and_unknown_keys_do_no_harm(saved):
    file = saved / "config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert load(saved).num_classes == 10
    file.write_text(file.read_text(encoding="utf-8-sig"))
    change(saved, "pretrained_cfg", "hf_hub_id", "somebody/something")
    change(saved, "pretrained_cfg", "unknown", [1, 2])
    assert not load(saved).pretrained_cfg.get("hf_hub_id")


def test_names_of_a_head_that_was_replaced_are_not_saved(tiny, tmp_path):
    tiny.pretrained_cfg.update(label_names=TEN)
    tiny.reset_classifier(3)
    assert class_names(load(save(tiny, tmp_path / "three"))) is None
    tiny.reset_classifier(0)
    assert class_names(load(save(tiny, tmp_path / "none"))) is None


def test_a_model_without_a_head_has_no_names(tiny, tmp_path):
    tiny.reset_classifier(0)
    folder = save(tiny, tmp_path / "none")
    change(folder, None, "label_names", TEN)
    assert class_names(load(folder)) is None


# ---- values that cannot be -----------------------------------------------------------------------

WRONG = [
    ("pretrained_cfg", "mean", "abc"),
    ("pretrained_cfg", "mean", 0.5),
    ("pretrained_cfg", "mean", [0.1, 0.2, 0.3, 0.4]),
    ("pretrained_cfg", "mean", [0.1, 0.2, "0.3"]),
    ("pretrained_cfg", "mean", [0.1, 0.2, None]),
    ("pretrained_cfg", "mean", []),
    ("pretrained_cfg", "mean", [math.nan] * 3),
    ("pretrained_cfg", "mean", [10**400] * 3),
    ("pretrained_cfg", "std", [0, 0, 0]),
    ("pretrained_cfg", "std", [-1, 1, 1]),
    ("pretrained_cfg", "std", [math.inf] * 3),
    ("pretrained_cfg", "interpolation", 3),
    ("pretrained_cfg", "interpolation", "cubic"),
    ("pretrained_cfg", "interpolation", ["bilinear"]),
    ("pretrained_cfg", "crop_pct", "x"),
    ("pretrained_cfg", "crop_pct", math.nan),
    ("pretrained_cfg", "crop_pct", 1e-9),
    ("pretrained_cfg", "crop_pct", -1),
    ("pretrained_cfg", "crop_pct", True),
    ("pretrained_cfg", "crop_pct", [1]),
    ("pretrained_cfg", "label_names", 5),
    ("pretrained_cfg", "label_names", "abcdefghij"),
    ("pretrained_cfg", "label_names", [*range(10)]),
    ("pretrained_cfg", "label_names", TEN[:9]),
    (None, "label_names", {"a": 0}),
    (None, "num_classes", -1),
    (None, "num_classes", "ten"),
    ("pretrained_cfg", "input_size", [3, 32]),
    ("pretrained_cfg", "input_size", 32),
    ("pretrained_cfg", "first_conv", 1),
    ("pretrained_cfg", "classifier", [1]),
    ("pretrained_cfg", "fixed_input_size", "yes"),
    ("model_args", "num_heads", -1),
    ("model_args", "num_heads", 0),
    ("model_args", "num_steps", 0),
    ("model_args", "num_steps", "3"),
    ("model_args", "num_steps", 10**9),
    ("model_args", "num_blocks", 10**400),
    ("model_args", "embed_dim", -4),
    ("model_args", "embed_dim", 32.0),
    ("model_args", "img_size", "large"),
    ("model_args", "img_size", [32, 32, 32]),
    ("model_args", "img_size", 10**6),
    ("model_args", "patch_size", 0),
    ("model_args", "in_chans", 10**7),
    ("model_args", "num_classes", True),
    ("model_args", "mlp_ratio", math.inf),
    ("model_args", "drop_rate", 2),
    ("model_args", "weight_init", math.nan),
    ("model_args", "weight_init", [[[[[[1]]]]]]),
    ("model_args", "weight_init", "x" * 100_000),
    ("model_args", "device", "meta"),
    ("model_args", "dtype", "float16"),
    ("model_args", "features_only", True),
    ("model_args", "checkpoint_path", "evil.pth"),
    ("model_args", "pretrained", True),
    ("model_args", "cache_dir", "/"),
]


@pytest.mark.parametrize(("part", "key", "value"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_one_line_with_its_key(saved, part, key, value):
    change(saved, part, key, value)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{key}") as caught:
        load(saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_every_step_of_the_schema_is_also_open_to_what_models_have():
    for names in timm.list_models("*vit*", pretrained=True)[::40]:
        cfg = timm.get_pretrained_cfg(names).to_dict()
        checked_cfg(cfg, "config.json")
    good = {"img_size": [48, 32], "embed_dim": [64, 128], "depth": [2, 2], "norm_layer": None}
    check_args(good, "config.json")


def test_steps_of_all_blocks_count_together(saved):
    change(saved, "model_args", "num_steps", 9_999)
    change(saved, "model_args", "num_blocks", 2)
    with pytest.raises(CheckpointError, match=r"num_blocks \* model_args\.num_steps must be"):
        load(saved)


@pytest.mark.parametrize(
    ("key", "value"), [("embed_dim", 65_536), ("img_size", 16_384), ("num_classes", 1_000_000)]
)
def test_a_model_far_larger_than_its_weights_is_not_built(saved, key, value, monkeypatch):
    change(saved, "model_args", key, value)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match=r"of at least [\d,]+ parameters, model\.safetensors"):
        load(saved)


def test_the_least_number_of_parameters_is_no_more_than_there_are(any_model):
    args = getattr(any_model, "model_args", None)
    if args is None:
        pytest.skip("made without its name")
    from bvit_interp.models.checkpoint.config import _least_parameters

    found = _least_parameters(args)
    assert 0 < found <= sum(parameter.numel() for parameter in any_model.parameters())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"architecture": ' * 100_000])
def test_nesting_without_end(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        read_config(saved / "config.json")


def test_a_folder_in_place_of_the_config(saved):
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(saved)
