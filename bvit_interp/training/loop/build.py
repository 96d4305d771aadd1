"""Build a recipe's model, optimiser and learning-rate schedule."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from bvit_interp.data.samples import Samples
from bvit_interp.errors import REFUSALS, UserError, choices
from bvit_interp.models import checkpoint
from bvit_interp.models.bvit import BViT, checkpoint_filter_fn
from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe

_EMA_HORIZON = 0.053  # share of the steps: 20,000 of the paper's 375,300


def make_model(recipe: Recipe, samples: Samples) -> BViT:
    """The recipe's model before its first step, with the names of the data's classes.

    Raises
    ------
    UserError
        If the model cannot be made, or does not fit the data or the checkpoint of `init`.
    """
    model = _created(recipe)
    name, classes = recipe.model["name"], len(samples.classes)
    if not isinstance(model, BViT):
        raise UserError(f"recipe: {name} is not a BViT")
    if model.in_chans != 3:
        raise UserError(f"recipe: model.in_chans is {model.in_chans}, images have 3")
    if model.num_classes != classes:
        raise UserError(
            f"recipe: model.num_classes is {model.num_classes}, the data has {classes} classes"
        )
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    if any(pixels % side for pixels, side in zip(size, patch, strict=True)):
        raise UserError(f"recipe: patches of {patch} do not tile {size} pixels")
    if recipe.init is not None:
        _load_weights(recipe.init, model, list(samples.classes))
    cfg = cast("dict[str, Any]", model.pretrained_cfg) | {"label_names": list(samples.classes)}
    if samples.native_size is not None or recipe.crop != "random-resized":
        cfg["crop_pct"] = 1.0  # training shows whole images
    model.pretrained_cfg = cfg  # type: ignore[assignment]
    return model


def _created(recipe: Recipe) -> VisionTransformer:
    arguments = dict(recipe.model)
    name = str(arguments.pop("name"))
    with seeded(recipe.seed):
        try:
            model: Any = timm.create_model(name, **arguments)
            if recipe.positions == "sincos":
                grid = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
                model.pos_embed.data[0, -len(grid) :] = grid
        except REFUSALS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            given = ", ".join(f"{key}={value}" for key, value in arguments.items())
            raise UserError(f"recipe: cannot make the model {name} ({given}): {reason}") from error
    return model


def _load_weights(init: str, model: BViT, classes: list[str]) -> None:
    """Start from a checkpoint; weights that it lacks keep their initial values.

    Patch embedding and positions are resampled (Beyer et al. 2023, "FlexiViT"; timm), and the head
    of other classes is left out.
    """
    source = checkpoint.load_vit(init, own_code=False)
    found, wanted = heads(source), heads(model)
    if found != wanted:
        raise UserError(f"recipe: {init} has {found} heads, the model {wanted}")
    weights, initial = checkpoint_filter_fn(source.state_dict(), model), model.state_dict()
    if checkpoint.class_names(source) not in (None, classes):
        weights = {key: weight for key, weight in weights.items() if not key.startswith("head")}
    misfits = [
        key for key in weights if key not in initial or initial[key].shape != weights[key].shape
    ]
    if misfits:
        raise UserError(f"recipe: {init} does not fit the model: {choices(misfits)}")
    model.load_state_dict(weights, strict=False)


def heads(model: VisionTransformer) -> int:
    """Number of attention heads of a model's blocks."""
    block: Any = next(model.blocks.children())
    return block.attn.num_heads


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> CosineLRScheduler:
    """Linear warm-up and a cosine; the learning rate depends on the step or the epoch alone.

    Parameters
    ----------
    steps : optimiser steps per epoch.
    """
    unit = 1 if recipe.schedule == "epoch" else steps
    warmup = round(recipe.warmup_epochs * unit)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(recipe.epochs * unit - warmup, 1),
        lr_min=recipe.min_lr,
        warmup_t=warmup,
        warmup_lr_init=recipe.lr * recipe.warmup_factor,
        warmup_prefix=True,
        t_in_epochs=recipe.schedule == "epoch",
    )


def optimizer(model: BViT, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; unless `decay_all`, norms, biases, tokens and positions have no weight decay."""
    groups = [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}]
    if not recipe.decay_all:
        # passed by name: the third parameter changed between timm's versions
        groups = param_groups_weight_decay(
            model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()
        )
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True, capturable=on_gpu)


def ema_decay(recipe: Recipe, total_steps: int) -> float:
    """The recipe's decay of the averaged weights, or one for a run of this many steps.

    The default averages over the same share of the run as the paper's decay: 20,000 of its 375,300
    steps.
    """
    if recipe.ema is not None:
        return recipe.ema
    return 1 - 1 / max(_EMA_HORIZON * total_steps, 1)
