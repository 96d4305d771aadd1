"""Prepare a model for training: masks, attention, compilation, gradients.

The weights stay those of the given model; a masked model is an unroll that shares them.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchDropout
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import Masks, masked
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.stepper import NoisePatchDropout
from bvit_interp.training.loop.throughput import prefers_fused_attention

_COMPILED_SHAPES = 64


def prepare(
    model: BViT,
    recipe: Recipe,
    masks: Masks | None,
    device: str,
    precision: str,
    world: int,
    captures: bool,
) -> nn.Module:
    """The model as it is trained.

    It is masked, recomputes its activations, compiles its blocks and shares its gradients, as the
    recipe asks. Masked blocks are not compiled: there is one per step, and each would be compiled
    by itself.

    Parameters
    ----------
    precision : bf16 or off.
    world : number of processes.
    captures : whether steps are captured in a CUDA graph.
    """
    trained: Any = model if masks is None else masked(model, masks)
    blocks: list[Any] = list(trained.blocks.children())
    trained.set_grad_checkpointing(recipe.grad_checkpointing)
    shape = _attention_shape(model, recipe, world)
    for block in blocks:
        block.attn.fused_attn = prefers_fused_attention(device, precision, shape)
    if captures and isinstance(trained.patch_drop, PatchDropout):
        trained.patch_drop = NoisePatchDropout(trained.patch_drop, trained.patch_embed.num_patches)
    if recipe.compile and masks is None:
        # blocks of one shape share compiled code, even those of several runs; shapes are counted
        torch._dynamo.config.recompile_limit = _COMPILED_SHAPES
        for block in blocks:
            block.compile(dynamic=False)
    if world == 1:
        return trained
    devices = None if device == "cpu" else [torch.device(device)]
    return DistributedDataParallel(trained, device_ids=devices, static_graph=recipe.accumulate == 1)


def _attention_shape(model: BViT, recipe: Recipe, world: int) -> tuple[int, int, int, int]:
    """Images, heads and tokens of a forward pass in training, and the width of a head."""
    block: Any = next(model.blocks.children())
    patches = round(model.patch_embed.num_patches * (1 - recipe.patch_drop(0)))
    images = recipe.batch_size // world // recipe.accumulate
    tokens = model.num_prefix_tokens + patches
    return images, block.attn.num_heads, tokens, block.attn.head_dim
