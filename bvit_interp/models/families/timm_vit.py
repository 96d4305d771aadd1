"""The blocks of timm's `VisionTransformer`: `timm.models.vision_transformer`."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.attention import Combine
from bvit_interp.models.families import OF_MODULES, BlockMap, register_block

GATED = "a gated FFN has no mlp_pre: its neurons have two inputs each; use mlp_post"
"""Why a gated FFN lacks a site."""
_PARALLEL = "attention and FFN of this block read the same input: there is no state between them"
_ADDED_TOGETHER = "attention and FFN of this block are added to the residual together"


def ffn(mlp: Any, name: str = "mlp") -> tuple[dict[str, str], dict[str, str]]:
    """The sites of a timm FFN, and why others are missing."""
    if not hasattr(mlp, "fc2"):
        reason = f"a {type(mlp).__name__} has no fc2 whose inputs would be its neurons"
        return {}, dict.fromkeys(("mlp_pre", "mlp_post"), reason)
    sites = {"mlp_post": f"{name}.fc2.in"}
    if getattr(getattr(mlp, "fc1", None), "out_features", None) != mlp.fc2.in_features:
        return sites, {"mlp_pre": GATED}
    return {"mlp_pre": f"{name}.fc1.out", **sites}, {}


def sequential(block: Any, resid_mid: str = "norm2.in") -> BlockMap:
    """Attention, then FFN, each added to the residual behind a drop path."""
    sites, missing = ffn(block.mlp)
    added = {"attn_out": "drop_path1.out", "resid_mid": resid_mid, "mlp_out": "drop_path2.out"}
    combine = differential(block.attn) if isinstance(block.attn, DiffAttention) else None
    return BlockMap({**added, **sites}, missing, combine)


def post_norm(block: Any) -> BlockMap:
    """As `sequential`, with norms after attention and FFN: the FFN reads the residual itself."""
    return sequential(block, resid_mid="mlp.in")


def differential(attention: Any) -> Combine:
    """Differential attention (Ye et al., 2024): a head's pattern is that of its first half minus
    lambda times that of its second half."""

    def combine(site: str, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            raise UserError(
                f"{site} of differential attention is seen only where it calls"
                " scaled_dot_product_attention: set its fused_attn"
            )
        first, second = parts
        if site == "v":
            return first
        if site in ("pattern", "z"):
            return first - attention._compute_lambda().type_as(first) * second
        raise UserError(f"differential attention has no {site}: each head has two; use pattern")

    return combine


def _side_by_side(attentions: list[Any]) -> Combine:
    """The heads of several attentions, one attention after the other."""

    def combine(site: str, parts: list[Tensor]) -> Tensor:
        if isinstance(attentions[0], DiffAttention):
            each = len(parts) // len(attentions)
            parts = [
                differential(attention)(site, parts[i * each : (i + 1) * each])
                for i, attention in enumerate(attentions)
            ]
        return torch.cat(parts, dim=1 if site in ("scores", "pattern") else 2)

    return combine


def _parallel_scaling(block: Any) -> BlockMap:
    sites = {"mlp_pre": "mlp_act.in", "mlp_post": "mlp_drop.out"}
    missing = {"resid_mid": _PARALLEL}
    if block.out_proj is None and isinstance(block.ls, nn.Identity):
        sites |= {"attn_out": "attn_out_proj.out", "mlp_out": "mlp_out_proj.out"}
    else:
        missing |= dict.fromkeys(("attn_out", "mlp_out"), _ADDED_TOGETHER)
    is_differential = isinstance(block, DiffParallelScalingBlock)
    return BlockMap(sites, missing, differential(block) if is_differential else None)


def _parallel_things(block: Any) -> BlockMap:
    reason = f"{block.num_parallel} attentions and FFNs of this block stand side by side"
    combine = _side_by_side([each.attn for each in block.attns])
    return BlockMap({}, dict.fromkeys(OF_MODULES, reason), combine)


register_block(Block, sequential)
register_block(ResPostBlock, post_norm)
register_block(ParallelScalingBlock, _parallel_scaling)
register_block(DiffParallelScalingBlock, _parallel_scaling)
register_block(ParallelThingsBlock, _parallel_things)
