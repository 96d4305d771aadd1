"""The blocks of Hugging Face's vision transformers: `transformers`, versions 4 and 5.

Blocks are registered by their full names. So nothing of `transformers` is imported here, and a
version that lacks one of them still has the others. A module that a block calls twice (the dropout
of `ViTLayer`, the drop path of `Dinov2Layer`) cannot be a site: attention and FFN are read in front
of it, which is the same in eval mode.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bvit_interp.models.families import BlockMap, register_block
from bvit_interp.models.families.timm_vit import GATED

_READS = ("up_proj", "fc1")
"""Names of an FFN's first projection."""
_WRITES = ("down_proj", "fc2", "weights_out")
"""Names of an FFN's last projection."""
_GATES = ("gate_proj", "weights_in")
"""Names of the projection that makes an FFN gated."""
_ADDED = ("attn_out", "mlp_out")
"""The sites that are added to the residual."""
_SCALED = "the scale of this layer (lambda_1, lambda_2) is multiplied outside of its modules"
"""Why a layer with such a scale lacks these sites."""


def _ffn(mlp: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """The sites of an FFN, and why others are missing."""
    names = {name for name, _ in mlp.named_children()}
    last = next((name for name in _WRITES if name in names), None)
    if last is None:
        reason = f"a {type(mlp).__name__} has no last projection whose inputs would be its neurons"
        return {}, dict.fromkeys(("mlp_pre", "mlp_post"), reason)
    first = next((name for name in _READS if name in names), None)
    sites = {"mlp_post": f"mlp.{last}.in"}
    if first is None or names.intersection(_GATES):
        return sites, {"mlp_pre": GATED}
    return {"mlp_pre": f"mlp.{first}.out", **sites}, {}


def _vit(block: Any) -> BlockMap:
    """Pre-norm without LayerScale: `ViTLayer` and `DeiTLayer`."""
    if hasattr(block, "intermediate"):  # version 4: the FFN is two modules of the block
        return BlockMap(
            {
                "attn_out": "attention.out",
                "resid_mid": "layernorm_after.in",
                "mlp_pre": "intermediate.dense.out",
                "mlp_post": "output.dense.in",
                "mlp_out": "output.dropout.out",
            }
        )
    sites, missing = _ffn(block.mlp)
    added = {"attn_out": "attention.out", "resid_mid": "layernorm_after.in", "mlp_out": "mlp.out"}
    return BlockMap({**added, **sites}, missing)


def _beit(block: Any) -> BlockMap:
    """As `_vit`; there may be a learned scale between attention or FFN and the residual."""
    known = _vit(block)
    if not isinstance(block.lambda_1, nn.Parameter):
        return known
    sites = {site: place for site, place in known.sites.items() if site not in _ADDED}
    return BlockMap(sites, {**known.missing, **dict.fromkeys(_ADDED, _SCALED)})


def _clip(block: Any) -> BlockMap:
    """Pre-norm, with attention that also returns its pattern: CLIP and SigLIP."""
    sites, missing = _ffn(block.mlp)
    added = {"attn_out": "self_attn.out", "resid_mid": "layer_norm2.in", "mlp_out": "mlp.out"}
    return BlockMap({**added, **sites}, missing)


def _dinov2(block: Any) -> BlockMap:
    """Pre-norm with LayerScale: `Dinov2Layer` and its relatives."""
    sites, missing = _ffn(block.mlp)
    added = {
        "attn_out": "layer_scale1.out",
        "resid_mid": "norm2.in",
        "mlp_out": "layer_scale2.out",
    }
    return BlockMap({**added, **sites}, missing)


for _model, _layer, _map in (
    ("vit", "ViTLayer", _vit),
    ("deit", "DeiTLayer", _vit),
    ("beit", "BeitLayer", _beit),
    ("clip", "CLIPEncoderLayer", _clip),
    ("siglip", "SiglipEncoderLayer", _clip),
    ("dinov2", "Dinov2Layer", _dinov2),
    ("dinov2_with_registers", "Dinov2WithRegistersLayer", _dinov2),
    ("dinov3_vit", "DINOv3ViTLayer", _dinov2),
):
    register_block(f"transformers.models.{_model}.modeling_{_model}.{_layer}", _map)
