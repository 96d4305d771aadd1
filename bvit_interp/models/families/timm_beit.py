"""The blocks of timm's `Beit`, whose scores have a relative position bias."""

from __future__ import annotations

from timm.models.beit import Block

from bvit_interp.models.families import register_block
from bvit_interp.models.families.timm_vit import sequential

register_block(Block, sequential)
