"""Reads and checks the `config.json` of a checkpoint.

There are three layouts. Ours and timm's have a mapping `pretrained_cfg`. Some files also have
`label_names` and `num_classes` beside it, which then take precedence. Hub models of 2022 have one
flat mapping with the entries of a `pretrained_cfg`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvit_interp.errors import CheckpointError, choices

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "lanczos", "box", "hamming")
_NOT_OF_CFG = {"architecture", "num_features", "global_pool", "model_args", "training"}
_FACTORY = {  # arguments of `timm.create_model` that are not the model's
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "exportable",
    "features_only",
    "no_jit",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "scriptable",
}
_MOST_TEXT, _MOST_ENTRIES, _DEEPEST = 10_000, 100_000, 4
_BYTES_PER_WEIGHT = 0.5  # no file of weights stores fewer

Check = Callable[[Any], str]
"""Returns what a value must be, or an empty string if it is valid."""


@dataclass(frozen=True)
class ModelConfig:
    """What a `config.json` says about its model.

    Attributes
    ----------
    file : the file, for messages.
    architecture : name of the model in timm.
    model_args : arguments that make it.
    cfg : the entries of its `pretrained_cfg` that are used and not null; `label_names` has one name
        per class.
    """

    file: Path
    architecture: str
    model_args: dict[str, Any]
    cfg: dict[str, Any]

    def check_size(self, weights: Path) -> None:
        """Refuse arguments of a model that is far larger than its weights file, before it is built.

        Raises
        ------
        CheckpointError
            If the file is too small for the parameters of the model.
        """
        parameters = _least_parameters(self.model_args)
        size = weights.stat().st_size
        if parameters * _BYTES_PER_WEIGHT > size:
            raise CheckpointError(
                f"{self.file}: model_args make a model of at least {parameters:,} parameters,"
                f" {weights.name} has {size:,} bytes"
            )


def read_config(file: Path) -> ModelConfig:
    """Read and check a `config.json`.

    Raises
    ------
    CheckpointError
        For a file that is not JSON, a model of another library, and a value of the wrong type,
        range or size; the message names file and key.
    """
    config = read_json(file)
    if "architecture" not in config and config.get("model_type"):
        raise CheckpointError(f"{file.parent} is a model of Hugging Face: say hf:{file.parent}")
    if "architecture" not in config:
        raise CheckpointError(f"{file}: not a model config, it has no architecture")
    args = _mapping(config, "model_args", file)
    check_args(args, file)
    cfg = _cfg_of(config, file)
    cfg = checked_cfg(cfg, file, args.get("num_classes"), args.get("in_chans") or 3)
    return ModelConfig(file, str(config["architecture"]), args, cfg)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises
    ------
    CheckpointError
        For a file that cannot be read, is not JSON, or is nested too deep.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise CheckpointError(f"{file}: not JSON that can be read, nested too deep") from None
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: not JSON ({reason})") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{file}: not a mapping of names to values, but a {kind}")
    return content


def check_args(args: Mapping[str, Any], file: Path) -> None:
    """Refuse arguments of a model that have the wrong type or an unreasonable size.

    Arguments that are known here have ranges. Others must be short JSON values with finite numbers.
    Whether the model accepts them is not checked here.
    """
    for key, value in args.items():
        if key in _FACTORY:
            raise CheckpointError(f"{file}: model_args.{key} is not an argument of a model")
        if value is not None:  # null counts as absent
            _require(_ARGS.get(key, _plain)(value), value, f"model_args.{key}", file)
    blocks, steps = args.get("num_blocks") or 1, args.get("num_steps") or 1
    if blocks * steps > _MOST_STEPS:
        raise CheckpointError(
            f"{file}: model_args.num_blocks * model_args.num_steps must be at most {_MOST_STEPS},"
            f" got {blocks * steps}"
        )


def checked_cfg(
    cfg: Mapping[str, Any], file: Path, classes: int | None = None, channels: int = 3
) -> dict[str, Any]:
    """The entries of a `pretrained_cfg` that are used, checked.

    Parameters
    ----------
    cfg : entries by timm's names. Null counts as absent, and unused entries are left out.
    file : the file, for messages.
    classes : the model's number of classes, if it is known.
    channels : channels of its images.

    Raises
    ------
    CheckpointError
        For the first value of the wrong type, range or size.
    """
    used = {key: cfg[key] for key in _CFG if cfg.get(key) is not None}
    for key, value in used.items():
        _require(_CFG[key](value), value, key, file)
    for key in ("mean", "std"):
        if key in used and len(used[key]) not in {1, 3, channels}:
            counts = " or ".join(str(n) for n in sorted({1, 3, channels}))
            _require(f"{counts} numbers", used[key], key, file)
    if classes is None:
        classes = used.get("num_classes")
    check_names(used.get("label_names"), classes, file)
    if classes == 0:  # no head
        used.pop("label_names", None)
    return used


def check_names(names: Sequence[str] | None, classes: int | None, file: Path) -> None:
    """Refuse class names whose number is not `classes`; None and 0 classes are not checked."""
    if names and classes and len(names) != classes:
        raise CheckpointError(
            f"{file}: label_names has {len(names)} names, the model {classes} classes"
        )


def _cfg_of(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The `pretrained_cfg` of any layout, with what stands beside it."""
    if "pretrained_cfg" not in config:
        cfg = {key: value for key, value in config.items() if key not in _NOT_OF_CFG}
        return {**({"label_names": cfg["labels"]} if "labels" in cfg else {}), **cfg}
    cfg = _mapping(config, "pretrained_cfg", file)
    beside = ("num_classes", "label_names", "label_descriptions")
    return cfg | {key: config[key] for key in beside if config.get(key) is not None}


def _mapping(config: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {key} must be a mapping of names to values")
    return dict(value)


def _require(wanted: str, value: Any, key: str, file: Path) -> None:
    if wanted:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise CheckpointError(f"{file}: {key} must be {wanted}, got {shown}")


# ---- what values may be --------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) and abs(value) < 2**53) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _integer(low: int, high: int) -> Check:
    wanted = f"a whole number in {low}..{high}"
    return lambda value: "" if _is_int(value) and low <= value <= high else wanted


def _number(low: float, high: float) -> Check:
    wanted = f"a number in {low:g}..{high:g}"
    return lambda value: "" if _is_number(value) and low <= value <= high else wanted


def _numbers(low: float, high: float) -> Check:
    one, wanted = _number(low, high), f"a list of numbers in {low:g}..{high:g}, one per channel"
    return lambda value: (
        "" if isinstance(value, (list, tuple)) and value and not any(map(one, value)) else wanted
    )


def _size(high: int) -> Check:
    """One whole number, or rows and columns."""
    one, wanted = _integer(1, high), f"a whole number in 1..{high} or two of them"

    def check(value: Any) -> str:
        pair = value if isinstance(value, (list, tuple)) else [value, value]
        return "" if len(pair) == 2 and not any(map(one, pair)) else wanted

    return check


def _each(one: Check) -> Check:
    """One value, or a list: models with stages have one value per stage."""

    def check(value: Any) -> str:
        values = value if isinstance(value, (list, tuple)) and value else [value]
        return next((wrong for each in values if (wrong := one(each))), "")

    return check


def _shape(value: Any) -> str:
    one = _integer(1, _MOST_PIXELS)
    right = isinstance(value, (list, tuple)) and len(value) == 3 and not any(map(one, value))
    return "" if right else f"channels, rows and columns, each in 1..{_MOST_PIXELS}"


def _names(value: Any) -> str:
    right = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    return "" if right else "a list of texts, a name per class"


def _one_of(*words: str) -> Check:
    return lambda value: "" if isinstance(value, str) and value in words else choices(words)


def _true_or_false(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _text_or_texts(value: Any) -> str:
    texts = value if isinstance(value, (list, tuple)) else [value]
    return "" if all(isinstance(text, str) for text in texts) else "a text or a list of texts"


def _descriptions(value: Any) -> str:
    return "" if isinstance(value, (dict, list, tuple)) else "a mapping or a list of texts"


def _plain(value: Any, depth: int = 0) -> str:
    """A short JSON value without NaN."""
    wanted = "a short JSON value with finite numbers"
    if value is None or isinstance(value, bool) or _is_number(value):
        return ""
    if isinstance(value, str):
        return "" if len(value) <= _MOST_TEXT else wanted
    if not isinstance(value, (dict, list)) or depth == _DEEPEST or len(value) > _MOST_ENTRIES:
        return wanted
    inside = value.values() if isinstance(value, dict) else value
    return wanted if any(_plain(each, depth + 1) for each in inside) else ""


_MOST_PIXELS, _MOST_STEPS, _MOST_WIDTH = 16_384, 10_000, 65_536
_share = _number(0, 1)
_ARGS: dict[str, Check] = {
    "img_size": _size(_MOST_PIXELS),
    "patch_size": _size(_MOST_PIXELS),
    "in_chans": _integer(1, 1024),
    "num_classes": _integer(0, 1_000_000),
    "embed_dim": _each(_integer(1, _MOST_WIDTH)),
    "depth": _each(_integer(1, _MOST_STEPS)),
    "num_blocks": _integer(1, _MOST_STEPS),
    "num_steps": _integer(1, _MOST_STEPS),
    "num_heads": _each(_integer(1, _MOST_WIDTH)),
    "reg_tokens": _integer(0, _MOST_WIDTH),
    "inner_updates": _integer(1, _MOST_STEPS),
    "interval": _integer(1, _MOST_STEPS),
    "mlp_ratio": _each(_number(0.001, 1000)),
    "drop_rate": _share,
    "pos_drop_rate": _share,
    "patch_drop_rate": _share,
    "proj_drop_rate": _share,
    "attn_drop_rate": _share,
    "drop_path_rate": _share,
}
_CFG: dict[str, Check] = {
    "num_classes": _integer(0, 1_000_000),
    "input_size": _shape,
    "fixed_input_size": _true_or_false,
    "interpolation": _one_of(*INTERPOLATIONS),
    "crop_pct": _number(0.05, 2),
    "crop_mode": _one_of("center", "squash", "border"),
    "mean": _numbers(-1000, 1000),
    "std": _numbers(1e-4, 1000),
    "label_names": _names,
    "label_descriptions": _descriptions,
    "first_conv": _text_or_texts,
    "classifier": _text_or_texts,
}


def _least_parameters(args: Mapping[str, Any]) -> int:
    """A lower bound on the number of parameters of a vision transformer with these arguments."""
    width: Any = args.get("embed_dim")
    if not _is_int(width):
        return 0
    blocks = args.get("depth") or args.get("num_blocks")
    in_block = 4 * width**2 + 2 * int(width**2 * _first(args.get("mlp_ratio") or 0))
    size, patch = _first(args.get("img_size") or 0), _first(args.get("patch_size") or 16)
    tokens = (size // patch) ** 2 + (args.get("reg_tokens") or 0)
    kernel = patch**2 * (args.get("in_chans") or 0)
    whole = in_block * (blocks if _is_int(blocks) else 1)
    return whole + width * (tokens + kernel + (args.get("num_classes") or 0))


def _first(value: Any) -> Any:
    """The smallest entry of a list, or the value itself."""
    return min(value, default=0) if isinstance(value, (list, tuple)) else value
