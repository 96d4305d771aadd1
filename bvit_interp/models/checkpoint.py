"""Checkpoints: a folder with `model.safetensors`, `config.json` and `README.md`.

Weights averaged over training (EMA) lie beside the raw ones as `ema.safetensors`; `FOLDER@ema`
opens them. Masks of the steps lie there as `masks.safetensors`; `FOLDER@masked` opens the raw
weights under them. The layout is timm's for a hub or local folder, so
`timm.create_model("local-dir:checkpoints/NAME", pretrained=True)` opens it too once `bvit_interp`
is imported. `load` also takes any timm name and foreign `.pt/.pth` files, the latter without ever
running code that a pickle may hold.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bvit_interp.errors import CheckpointError, UserError, choices
from bvit_interp.models import bvit, masks
from bvit_interp.models.unroll import is_unrolled

WEIGHTS, EMA, CONFIG, CARD = "model.safetensors", "ema.safetensors", "config.json", "README.md"
# keys under which training scripts put the weights
_WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
)
_FROM_TIMM, _AVERAGED, _MASKED = "timm:", "@ema", "@masked"
_STORED = (torch.float32, torch.float16, torch.bfloat16)
# what torch's restricted unpickler says of a function or class, in any protocol (149: STACK_GLOBAL)
_SIGNS_OF_CODE = ("unsupported global", "unsupported operand 149")


def save(
    model: bvit.BViT,
    folder: str | Path,
    card: str = "",
    about: Mapping[str, Any] | None = None,
    ema: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a recurrent model (or matched stack) as a checkpoint folder; an existing one is
    replaced.

    Everything is written beside the folder first and then renamed into it file by file, so that a
    full disk or an error leaves an existing checkpoint as it was.

    Parameters
    ----------
    model : a `BViT`; not its unroll, which shares its weights.
    folder : the folder, made if missing; on an error it is left as it was.
    card : text of the model card.
    about : JSON-able facts for `config.json` under "training" (recipe, seed, accuracy, ...).
    ema : averaged weights, a state dict of the model's keys and shapes, for `ema.safetensors`;
        without it, one that an earlier save left is removed.
    dtype : float32, float16 or bfloat16, in which floating tensors are stored; by default their
        own. A model opened again is float32.

    Returns
    -------
    The folder.

    Raises
    ------
    CheckpointError
        For a model that would not open again as it is, averaged weights of another model, or
        weights beyond the range of `dtype`.
    """
    if not isinstance(model, bvit.BViT):
        raise CheckpointError(f"only a BViT is saved here, got {type(model).__name__}")
    if is_unrolled(model):
        raise CheckpointError("this is a tied unroll: save the recurrent model it came from")
    if not hasattr(model, "model_args"):
        raise CheckpointError(
            "a BViT is saved under the name that rebuilds it: use timm.create_model"
        )
    _check_rebuilds(model)
    weights = {WEIGHTS: model.state_dict()}
    if ema is not None:
        found = _misfits(model.state_dict(), ema)
        if found:
            raise CheckpointError(f"the averaged weights do not fit the model. {found}")
        weights[EMA] = dict(ema)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        for name, tensors in weights.items():
            stored = _as_stored(tensors, dtype)
            try:
                safetensors.torch.save_file(
                    stored, str(Path(temporary, name)), metadata={"format": "pt"}
                )
            except SafetensorError as error:  # a full disk, for instance
                raise CheckpointError(f"{folder / name} cannot be written ({error})") from error
        config = _config_of(model) | ({"training": dict(about)} if about else {})
        Path(temporary, CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        Path(temporary, CARD).write_text(card or f"# {folder.name}\n")
        for name in weights:  # safetensors leaves them to their owner alone
            shutil.copymode(Path(temporary, CONFIG), Path(temporary, name))
        folder.mkdir(exist_ok=True)
        for name in (*weights, CONFIG, CARD):
            Path(temporary, name).replace(folder / name)
        if ema is None:
            (folder / EMA).unlink(missing_ok=True)
    return folder


def _as_stored(
    weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, floating ones in `dtype`."""
    if dtype not in (None, *_STORED):
        raise CheckpointError(f"weights cannot be stored as {dtype}; types: {choices(_STORED)}")
    stored = {}
    for name, tensor in weights.items():
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        if (kept.isinf() & ~tensor.detach().cpu().isinf()).any():
            raise CheckpointError(f"{name} holds weights beyond the range of {dtype}")
        stored[name] = kept
    return stored


def load(spec: str | Path, device: str | torch.device = "cpu") -> VisionTransformer:
    """Open a model, in eval mode.

    Parameters
    ----------
    spec : a checkpoint folder; ``FOLDER@ema`` for its averaged weights; ``FOLDER@masked`` for its
        raw weights under the masks of its steps, an unroll whose steps have weights of their own;
        ``timm:NAME`` (weights as timm finds them), ``timm:NAME@random`` (seeded random weights) or
        ``timm:NAME@FILE`` for a foreign `.safetensors/.pt/.pth` file of that architecture; a
        `.safetensors/.pt/.pth` file beside its `config.json`.
    device : where the model goes.

    Raises
    ------
    CheckpointError
        For anything that cannot be opened, and for keys that do not fit, which are listed.
    """
    text = str(spec)
    from_timm = text.startswith(_FROM_TIMM)
    model = _load_timm(text.removeprefix(_FROM_TIMM)) if from_timm else _load_path(*_split(text))
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{text}: {name} holds NaN or infinite weights")
    return model.to(device).eval()


def display_name(spec: str | Path) -> str:
    """Short name of a checkpoint for tables and figures: the folder's (with @ema or @masked), or
    timm's."""
    text = str(spec)
    if text.startswith(_FROM_TIMM):
        return text.removeprefix(_FROM_TIMM)
    path, kind = _split(text)
    return path.resolve().name + kind


def versions(spec: str | Path) -> list[str]:
    """The spec, and after it ``FOLDER@ema`` if it is a folder with averaged weights beside the raw
    ones."""
    text = str(spec)
    path, kind = _split(text)
    beside = not kind and path.is_dir() and (path / EMA).is_file()
    return [text, f"{text.rstrip('/')}{_AVERAGED}"] if beside else [text]


def _split(text: str) -> tuple[Path, str]:
    """Path of a spec, and @ema, @masked or nothing behind it; a path that is there is meant as it
    is."""
    for kind in (_AVERAGED, _MASKED):
        if text.endswith(kind) and not Path(text).exists():
            return Path(text.removesuffix(kind)), kind
    return Path(text), ""


def class_names(model: VisionTransformer) -> list[str] | None:
    """The names of the model's classes as its checkpoint tells them, or None."""
    cfg: Any = model.pretrained_cfg
    names = cfg.get("label_names") or None
    return list(names) if names else None


def _args_of(model: Any) -> dict[str, Any]:
    """The arguments that rebuild the model as it is now (it may have been resized or given another
    head)."""
    return model.model_args | {
        "num_classes": model.num_classes,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.in_chans,
        "global_pool": model.global_pool,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }


def _check_rebuilds(model: Any) -> None:
    """Refuse a model that was cut, pruned or grafted: its checkpoint would open as another
    model."""
    with torch.device("meta"):
        twin: Any = timm.create_model(model.pretrained_cfg["architecture"], **_args_of(model))
    if len(twin.blocks) != len(model.blocks):
        raise CheckpointError(
            f"the model has {len(model.blocks)} steps but was made with {len(twin.blocks)}: "
            f"make one with that num_steps and copy the weights"
        )
    found = _misfits(twin.state_dict(), model.state_dict())
    if found:
        raise CheckpointError(
            f"the model was changed since it was made and would not open again. {found}"
        )


def _config_of(model: Any) -> dict[str, Any]:
    cfg = dict(model.pretrained_cfg)
    height, width = model.patch_embed.img_size
    kept = ("crop_pct", "interpolation", "mean", "std", "label_names", "first_conv", "classifier")
    return {
        "architecture": cfg["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": _args_of(model),
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [model.in_chans, height, width],
            "fixed_input_size": True,
            **{key: cfg[key] for key in kept if cfg.get(key) is not None},
        },
    }


def _load_timm(name: str) -> VisionTransformer:
    name, _, source = name.partition("@")
    if not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name!r}; close: {choices(_close_names(name))}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the GPUs too
            model = timm.create_model(name, pretrained=not source)
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"timm:{name}: weights could not be had ({reason}); timm:{name}@random or"
            f" timm:{name}@FILE work offline"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise CheckpointError(f"timm:{name} is a {type(model).__name__}, not a VisionTransformer")
    if source not in ("", "random"):
        _fill(model, read_weights(Path(source)), source)
    return model


def _close_names(name: str) -> list[str]:
    return difflib.get_close_matches(name, timm.list_models(), n=5) or timm.list_models("bvit_*")


def _load_path(path: Path, kind: str) -> VisionTransformer:
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}: give a folder, a weights file, or timm:NAME"
        )
    if kind == _AVERAGED and not (path / EMA).is_file():
        raise CheckpointError(
            f"{path} has no averaged weights ({EMA}): leave out {_AVERAGED} for the raw ones"
        )
    if kind == _MASKED and not (path / masks.FILE).is_file():
        raise CheckpointError(
            f"{path} has no masks ({masks.FILE}): leave out {_MASKED} for its weights without"
        )
    folder, weights = (
        (path, path / (EMA if kind == _AVERAGED else WEIGHTS))
        if path.is_dir()
        else (path.parent, path)
    )
    config_file = folder / CONFIG
    if not config_file.is_file():
        hint = f"; for a bare weights file say timm:NAME@{path}" if path.is_file() else ""
        raise CheckpointError(f"{folder} has no {CONFIG}{hint}")
    try:
        config = json.loads(config_file.read_text())
        name, args = str(config["architecture"]), dict(config.get("model_args", {}))
        cfg = dict(config.get("pretrained_cfg", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{config_file}: not a model config ({reason})") from error
    if not timm.is_model(name):
        close = choices(_close_names(name))
        raise CheckpointError(f"{config_file}: unknown architecture {name!r}; close: {close}")
    overlay = {key: value for key, value in cfg.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=False, pretrained_cfg_overlay=overlay, **args)
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
        LookupError,
        ArithmeticError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{config_file}: {name} cannot be built from its model_args ({reason})"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise CheckpointError(
            f"{config_file}: {name} is a {type(model).__name__}, not a VisionTransformer"
        )
    _fill(model, read_weights(weights), str(weights))
    return _under_masks(model, path / masks.FILE) if kind == _MASKED else model


def _under_masks(model: VisionTransformer, file: Path) -> VisionTransformer:
    try:
        return masks.masked(model, masks.Masks.load(file, model), baked=True)
    except CheckpointError:
        raise
    except UserError as error:  # masks of other things than steps
        raise CheckpointError(f"{file}: {error}") from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a `.safetensors`, `.pt` or `.pth` file; a pickle that holds code is
    refused."""
    if not path.is_file():
        raise CheckpointError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file ({error})"
            ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises UnpicklingError, RuntimeError, EOFError, ... as the damage is
    except Exception as error:
        code = any(sign in str(error).lower() for sign in _SIGNS_OF_CODE)
        kind = "it holds code, which is never run" if code else "truncated or no checkpoint"
        raise CheckpointError(f"{path}: not opened, {kind}") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(
        isinstance(v, torch.Tensor) for v in content.values()
    )
    if not tensors:
        raise CheckpointError(f"{path}: no state dict inside (a mapping of names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _fill(model: VisionTransformer, weights: dict[str, torch.Tensor], source: str) -> None:
    found = _misfits(model.state_dict(), weights)
    if found:
        raise CheckpointError(f"{source} does not fit the model. {found}")
    model.load_state_dict(weights)


def _misfits(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> str:
    """What of `weights` does not fit a model whose state dict is `own`, or an empty string."""
    misfits = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
            for key in sorted(own.keys() & weights.keys())
            if own[key].shape != weights[key].shape
        ],
    }
    return "; ".join(f"{kind}: {choices(keys)}" for kind, keys in misfits.items() if keys)
