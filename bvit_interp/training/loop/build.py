"""Where a training run starts: the recipe's model before its first step, and its optimiser and
learning rate."""

from __future__ import annotations

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError, choices
from bvit_interp.models import checkpoint
from bvit_interp.models.bvit import BViT
from bvit_interp.training.loop.draws import drawn_for
from bvit_interp.training.loop.recipe import Recipe


def make_model(recipe: Recipe, samples: Samples) -> BViT:
    """The recipe's model before its first step, named after the data's classes."""
    arguments = dict(recipe.model)
    name = str(arguments.pop("name"))
    with drawn_for(recipe.seed):
        try:
            model = timm.create_model(name, **arguments)
            if recipe.positions == "sincos":
                grid = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
                model.pos_embed.data[0, -len(grid) :] = grid
        except (
            TypeError,
            ValueError,
            AssertionError,
            RuntimeError,
            LookupError,
            ArithmeticError,
        ) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            given = ", ".join(f"{key}={value}" for key, value in arguments.items())
            raise UserError(f"recipe: cannot make the model {name} ({given}): {reason}") from error
    if not isinstance(model, BViT):
        raise UserError(f"recipe: {name} is not a BViT")
    if model.in_chans != 3:
        raise UserError(f"recipe: model.in_chans is {model.in_chans}, images have 3")
    if model.num_classes != len(samples.classes):
        raise UserError(
            f"recipe: model.num_classes is {model.num_classes}, the data has {len(samples.classes)} classes"
        )
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    if any(pixels % side for pixels, side in zip(size, patch, strict=True)):
        raise UserError(f"recipe: patches of {patch} do not tile {size} pixels")
    if recipe.init is not None:
        _start_from(recipe.init, model)
    if (
        samples.native_size is not None or recipe.crop != "random-resized"
    ):  # the whole image is trained on
        model.pretrained_cfg |= {"crop_pct": 1.0}
    model.pretrained_cfg |= {"label_names": list(samples.classes)}
    return model


def _start_from(init: str, model: BViT) -> None:
    source = checkpoint.load(init)
    heads, wanted = (next(kind.blocks.children()).attn.num_heads for kind in (source, model))
    if heads != wanted:
        raise UserError(f"recipe: {init} has {heads} heads, the model {wanted}")
    weights, own = source.state_dict(), model.state_dict()
    misfits = [key for key in weights if key not in own or own[key].shape != weights[key].shape]
    if misfits:
        raise UserError(f"recipe: {init} does not fit the model: {choices(misfits)}")
    model.load_state_dict(weights, strict=False)


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> CosineLRScheduler:
    """Linear warm-up and cosine: the learning rate is a function of the step, or of the epoch,
    alone."""
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
    """AdamW; unless `decay_all`, norms, biases, tokens and positions are free of weight decay."""
    groups = [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}]
    if not recipe.decay_all:
        free = (
            model.no_weight_decay()
        )  # given by name: the third argument changed between timm's versions
        groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=free)
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True, capturable=on_gpu)


def ema_decay(recipe: Recipe, total_steps: int) -> float:
    """The recipe's, or that of the paper's horizon in a run of this length (20,000 of 375,300 steps
    there)."""
    return 1 - 1 / max(0.053 * total_steps, 1) if recipe.ema is None else recipe.ema
