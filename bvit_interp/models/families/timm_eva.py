"""timm's `Eva` blocks: EVA, EVA-02, DINOv3, rotary ViTs."""

from __future__ import annotations

from timm.models.eva import EvaBlock, EvaBlockPostNorm

from bvit_interp.models.families import register_block
from bvit_interp.models.families.timm_vit import post_norm, sequential

register_block(EvaBlock, sequential)
register_block(EvaBlockPostNorm, post_norm)
