"""Cost of a model: parameters, and FLOPs counted from shapes.

The convention is that of bViT (arXiv 2605.10661, Tables 1-3): 2 x the multiply-accumulates of
Linear and Conv weights. Biases, norms, softmax and GELU are not counted. QK^T and AV are counted
only with `count_attention`. Counters that watch a forward pass disagree with each other on fused
attention; this one reads shapes. A shared block costs its FLOPs at every step and its parameters
once. Adding a memory to the state is not counted, like any addition; each update of a memory by the
block is one application of the block.

GFLOPs of bViT-B: 0.232747 + 2.788688 t, which is 33.697 at t = 12 (35.128 with attention). bViT-fl
(n = 3): 134.1. bViT-sc: 33.697 with memory="state"; 50.4, 44.9, 42.1, 39.3 and 36.5 with "block"
and k = 2, 3, 4, 6 and 12. Distilled bViT-B: 33.87.

The shapes of a `CalledSteps` are not known. For it torch's counter watches one forward, with
attention as plain matrix products so that they can be counted separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bvit_interp.errors import UserError
from bvit_interp.models.attention import unfused
from bvit_interp.models.dry_run import dry, example_images
from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.steps import Steps


def flops(model: Model, *, count_attention: bool, steps: int | None = None) -> int:
    """FLOPs per image at the model's input size: patch embedding, `steps` steps, the head on one
    row.

    Parameters
    ----------
    model : a `BViT`, its unroll, a timm `VisionTransformer` with a plain patch embedding, or a
        `CalledSteps`.
    count_attention : add QK^T and AV, 2 * 2 * N^2 * D per step for N tokens (CLS and registers
        are tokens).
    steps : as in `unroll`: by default as many as the model has; a stack can only be shortened.

    Raises
    ------
    UserError
        For a number of steps that the model cannot take, or a module whose cost is not known here.
    """
    steps = len(model.blocks) if steps is None else steps
    if steps < 1:
        raise UserError(f"steps must be >= 1, got {steps}")
    if isinstance(model, CalledSteps):
        return _watched(model, steps, count_attention)
    each = (
        flops_per_step(model, count_attention=count_attention, step=t) for t in range(1, steps + 1)
    )
    return _patch_embedding(model) + sum(each) + _head(model)


def flops_per_step(model: VisionTransformer, *, count_attention: bool, step: int = 1) -> int:
    """FLOPs per image of step `step` (from 1), with its inner updates.

    Without inner updates all steps of a `BViT` cost the same.
    """
    block = _block_of(model, step)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    linear = tokens * sum(
        _per_row(module) for module in block.modules() if isinstance(module, nn.Linear)
    )
    once = linear + (_attention(block, tokens) if count_attention else 0)
    # in an unroll the inner updates are modules of the step; a recurrent block calls itself
    if isinstance(model.blocks, Steps) and isinstance(block, MemoryBlock):
        return once * (1 + block.memory.updates(step - 1))
    return once


def parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once, so a model and its unroll have the same."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_by_part(model: Model) -> dict[str, int]:
    """Number of parameters of the parts `embedding`, `blocks`, `norm` and `head`; their sum is
    `parameters`.

    The embedding is the patch embedding, the positions and the prefix tokens. Time embeddings
    belong to the blocks.

    Raises
    ------
    UserError
        For a `CalledSteps`: only its blocks are known.
    """
    if isinstance(model, CalledSteps):
        raise UserError("it is not known which parts of this model are embedding, norm and head")
    counts = dict.fromkeys(("embedding", "blocks", "norm", "head"), 0)
    for name, parameter in model.named_parameters():
        counts[_part_of(name)] += parameter.numel()
    return counts


def _watched(view: CalledSteps, steps: int, count_attention: bool) -> int:
    """FLOPs of one forward as torch counts them, without the steps after `steps`."""
    total = len(view.blocks)
    if steps > total:
        raise UserError(f"this model has {total} steps and cannot take {steps}")
    counter = FlopCounterMode(display=False)
    image = example_images(view, view.layout.image_size, view.layout.channels)[:1]
    with dry(view), unfused(), sdpa_kernel(SDPBackend.MATH), counter:
        view(image)
    counts = counter.get_flop_counts()
    left_out = [f"{type(view).__name__}.blocks.{i}" for i in range(steps, total)]
    return _matched(counts["Global"], count_attention) - sum(
        _matched(counts[module], count_attention) for module in left_out
    )


def _matched(counts: Mapping[Any, int], count_attention: bool) -> int:
    """The FLOPs of Linear and Conv weights, and with `count_attention` those of other products."""
    of_weights = ("aten.addmm", "aten.mm", "aten.convolution")
    return sum(count for op, count in counts.items() if count_attention or str(op) in of_weights)


def _part_of(name: str) -> str:
    """The part of the model that a parameter of this name belongs to."""
    starts = {
        "blocks.": "blocks",
        "norm": "norm",
        "fc_norm": "norm",
        "head": "head",
        "attn_pool": "head",
    }
    return next((part for start, part in starts.items() if name.startswith(start)), "embedding")


def _block_of(model: VisionTransformer, step: int) -> nn.Module:
    blocks = model.blocks
    if isinstance(blocks, Steps) and step >= 1:
        return list(blocks._modules.values())[blocks.block_index(step - 1)]
    if not 1 <= step <= len(blocks):
        raise UserError(f"step {step} is not one of the model's steps 1..{len(blocks)}")
    return blocks[step - 1]


def _per_row(linear: nn.Linear) -> int:
    return 2 * linear.in_features * linear.out_features


def _attention(block: nn.Module, tokens: int) -> int:
    """QK^T and AV: per head, two products of tokens x tokens x head width."""
    found = [module for module in block.modules() if isinstance(module, Attention)]
    if not found:
        raise UserError(
            f"the attention of {type(block).__name__} is not one whose FLOPs are known here"
        )
    return sum(2 * 2 * tokens**2 * attention.num_heads * attention.head_dim for attention in found)


def _patch_embedding(model: VisionTransformer) -> int:
    embedding = model.patch_embed
    if not isinstance(embedding, PatchEmbed) or not isinstance(embedding.proj, nn.Conv2d):
        raise UserError(
            f"FLOPs are known for a plain patch embedding, got {type(embedding).__name__}"
        )
    if embedding.num_patches is None:
        raise UserError("the model has no fixed image size, so its FLOPs cannot be counted")
    kernel = (
        embedding.proj.weight
    )  # (D, C, p, p), applied once per patch; prefix tokens are not embedded
    return 2 * kernel.numel() * embedding.num_patches


def _head(model: VisionTransformer) -> int:
    """The classifiers (two in a distilled model), each read from one row."""
    if model.attn_pool is not None:
        raise UserError("FLOPs are not known for an attention-pooling head")
    heads = (module for name, module in model.named_children() if name.startswith("head"))
    return sum(_per_row(head) for head in heads if isinstance(head, nn.Linear))
