"""The block of torch: `nn.TransformerEncoderLayer`, with norms before or after its parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from bvit_interp.models.families import OF_MODULES, BlockMap, register_block


def _map(block: Any) -> BlockMap:
    if not block.self_attn.batch_first:
        reason = "its tokens come as (tokens, batch, width): build it with batch_first=True"
        return BlockMap({}, dict.fromkeys(OF_MODULES, reason))
    return BlockMap(
        {
            "attn_out": "dropout1.out",
            "resid_mid": "norm2.in" if block.norm_first else "norm1.out",
            "mlp_pre": "linear1.out",
            "mlp_post": "linear2.in",
            "mlp_out": "dropout2.out",
        }
    )


register_block(nn.TransformerEncoderLayer, _map)
