"""The block of torchvision's `VisionTransformer`."""

from __future__ import annotations

from torchvision.models.vision_transformer import EncoderBlock

from bvit_interp.models.families import register_block

register_block(
    EncoderBlock,
    {
        "attn_out": "dropout.out",
        "resid_mid": "ln_2.in",
        "mlp_pre": "mlp.0.out",
        "mlp_post": "mlp.3.in",
        "mlp_out": "mlp.out",
    },
)
