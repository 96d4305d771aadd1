"""Writes a checkpoint folder: `model.safetensors`, `config.json` and `README.md`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import nn

from bvit_interp.errors import CheckpointError, choices
from bvit_interp.models import bvit
from bvit_interp.models.checkpoint.specs import CARD, CONFIG, EMA, WEIGHTS
from bvit_interp.models.checkpoint.weights import misfits
from bvit_interp.models.unroll import is_unrolled

_STORED = (torch.float32, torch.float16, torch.bfloat16)


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

    Everything is first written beside the folder and then renamed into it, file by file. So a full
    disk or an error leaves an existing checkpoint as it was.

    Parameters
    ----------
    model : a `BViT`; not its unroll, which shares its weights.
    folder : the folder, made if missing; on an error it is left as it was.
    card : text of the model card.
    about : facts for `config.json` under "training" (recipe, seed, accuracy, ...), as JSON values.
    ema : averaged weights for `ema.safetensors`: a state dict with the model's keys and shapes.
        Without it, an existing `ema.safetensors` is removed.
    dtype : float32, float16 or bfloat16, in which floating tensors are stored; by default each
        keeps its own. A model that is opened again is float32.

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
        found = misfits(model.state_dict(), ema)
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
        for name in weights:  # safetensors lets only the owner read them
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


def _args_of(model: Any) -> dict[str, Any]:
    """The arguments that rebuild the model as it is now: it may have another size or head than when
    it was made."""
    return model.model_args | {
        "num_classes": model.num_classes,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.in_chans,
        "global_pool": model.global_pool,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
    }


def _check_rebuilds(model: Any) -> None:
    """Refuse a model that was cut, pruned or otherwise changed: its checkpoint would open as
    another model."""
    with torch.device("meta"):
        twin: Any = timm.create_model(model.pretrained_cfg["architecture"], **_args_of(model))
    if len(twin.blocks) != len(model.blocks):
        raise CheckpointError(
            f"the model has {len(model.blocks)} steps but was made with {len(twin.blocks)}: "
            f"make one with that num_steps and copy the weights"
        )
    found = misfits(twin.state_dict(), model.state_dict())
    if found:
        raise CheckpointError(
            f"the model was changed since it was made and would not open again. {found}"
        )


def _config_of(model: Any) -> dict[str, Any]:
    cfg = dict(model.pretrained_cfg)
    if len(cfg.get("label_names") or ()) != model.num_classes:
        cfg.pop("label_names", None)  # these belong to an earlier head
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
