"""Our blocks: with a time embedding, or with a memory."""

from __future__ import annotations

from bvit_interp.models.families import register_block
from bvit_interp.models.families.timm_vit import sequential
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.steps import TimedBlock

register_block(TimedBlock, sequential)
register_block(MemoryBlock, sequential)
