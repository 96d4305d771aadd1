"""`load`: one function for every kind of checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models.checkpoint.folders import open_path
from bvit_interp.models.checkpoint.huggingface import open_huggingface
from bvit_interp.models.checkpoint.own_code import open_own
from bvit_interp.models.checkpoint.specs import Kind, Spec, parse
from bvit_interp.models.checkpoint.timm_models import open_timm
from bvit_interp.models.checkpoint.torchvision_models import open_torchvision
from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.unroll import unroll

_OPENERS: dict[Kind, Callable[[Spec], nn.Module]] = {
    "path": open_path,
    "timm": open_timm,
    "torchvision": open_torchvision,
    "hf": open_huggingface,
    "module": open_own,
    "python": open_own,
}
_KNOWN = ("timm", "bvit_interp")
"""Packages whose `VisionTransformer` is known to run its `blocks` in turn."""


def load(
    spec: str | Path,
    device: str | torch.device = "cpu",
    *,
    loop: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    own_code: bool = True,
) -> Model:
    """Open a model, in eval mode.

    A `BViT` and a `VisionTransformer` that runs its own blocks in turn are returned as they are.
    Any other model, and any model whose loop, prefix or grid is given, is returned as its unroll, a
    `CalledSteps`.

    Parameters
    ----------
    spec : one of

        - a checkpoint folder; ``FOLDER@ema`` for its averaged weights; ``FOLDER@masked`` for its
          raw weights under the masks of its steps, an unroll whose steps have weights of their own;
        - a `.safetensors/.pt/.pth/.ckpt/.bin` file beside its `config.json`, or ``FILE@ema``;
        - ``timm:NAME`` (timm's pretrained weights), ``timm:NAME@random`` (seeded random weights),
          ``timm:NAME@FILE`` for a weights file of that architecture, or ``timm:NAME@FILE@ema``;
        - ``torchvision:NAME``, with the same endings;
        - ``hf:FOLDER``, a folder that `save_pretrained` of transformers wrote;
        - ``FILE.py:factory`` or ``module:package.module.factory``: what that function returns. The
          file or module is run.

        These options may follow: ``@loop=PATH``, the block whose calls are the steps; ``@size=N``,
        the size of the images; ``@prefix=cls,reg``, the kinds of the tokens before the patches;
        ``@grid=14x14``, the rows and columns of patches.
    device : device of the model.
    loop : as ``@loop=PATH``; see `bvit_interp.unroll`.
    image_size : as ``@size=N``, in pixels, or (rows, columns). Position embeddings are resampled
        bicubically, as in timm.
    own_code : False refuses specs that run code. It is for a spec that comes from a file and not
        from the user.

    Raises
    ------
    CheckpointError
        For anything that cannot be opened, for keys that do not fit (they are listed), for NaN or
        infinite weights, and for a model whose steps are not clear.
    """
    wanted = parse(str(spec))
    if not own_code and wanted.kind in ("module", "python"):
        raise CheckpointError(f"{spec}: code is run only where --ckpt names it, not for a recipe")
    if loop is not None:
        wanted = dataclasses.replace(wanted, loop=loop)
    if image_size is not None:
        pair = (image_size, image_size) if isinstance(image_size, int) else image_size
        wanted = dataclasses.replace(wanted, size=pair)
    model = _OPENERS[wanted.kind](wanted)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise CheckpointError(f"{wanted.text}: {name} is a meta tensor and has no values")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{wanted.text}: {name} holds NaN or infinite weights")
    return _with_steps(model.to(device).eval(), wanted)


def load_vit(
    spec: str | Path, device: str | torch.device = "cpu", *, own_code: bool = True
) -> VisionTransformer:
    """As `load`, where only a `BViT` or a `VisionTransformer` of timm can be used.

    Raises
    ------
    CheckpointError
        As `load`, and for any other model.
    """
    model = load(spec, device, own_code=own_code)
    if isinstance(model, CalledSteps):
        kind = type(model.model).__name__
        raise CheckpointError(
            f"{spec}: this takes a BViT or a VisionTransformer of timm run as a stack, not a {kind}"
        )
    return model


def class_names(model: Model) -> list[str] | None:
    """The names of the model's classes as its checkpoint tells them, or None."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("label_names") or None
    return list(names) if names else None


def _with_steps(model: nn.Module, spec: Spec) -> Any:
    """The model as analyses take it: itself where its own blocks are its steps, else its unroll."""
    known = type(model).__module__.partition(".")[0] in _KNOWN
    told: dict[str, Any] = {"loop": spec.loop, "prefix": spec.prefix, "grid": spec.grid}
    told = {name: value for name, value in told.items() if value is not None}
    if isinstance(model, CalledSteps) and not told:
        return model
    if not told and known and isinstance(model, VisionTransformer):
        return model
    own = spec.kind in ("module", "python")
    size = spec.size if own else None
    try:
        view = unroll(model, image_size=size, **told)
    except UserError as error:
        raise CheckpointError(f"{spec.text}: {error}") from error
    except Exception as error:  # the model's own forward may raise anything
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{spec.text}: the model fails on two images in a dry run"
            f" ({type(error).__name__}: {reason})"
        ) from error
    return view if isinstance(view, CalledSteps) else model
