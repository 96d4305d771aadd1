"""How accurate is the head after every step, also past the trained ones?"""

from __future__ import annotations

from dataclasses import dataclass

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the step accuracy."""

    steps: int = 24
    """Steps to run, from 1; a stacked ViT (one of timm, or a matched `vit_rms_*`) stops at its last
    block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")


COLUMNS = {
    "model": "checkpoint",
    "step": "step t after which the head answers, from 1",
    "trained_steps": "steps T the model was made for; of a stack, its blocks",
    "n": "images",
    "top1": "share of images classified right, 0..1",
    "low": "lower end of Wilson's 95 % interval of it",
    "high": "upper end of it",
    "top5": "share whose class is among the five of the largest logits, 0..1; none for fewer than 5 classes",
    "loss": "mean cross-entropy, nats",
    "confidence": "mean of the largest softmax probability, 0..1",
    "entropy": "mean entropy of the softmax, nats",
    "true_rank": "mean rank of the true class among the logits, 1 (largest) to C",
    "rank_null": "null: the rank expected of logits in random order, (C + 1) / 2",
    "agreement": "share of images with the answer of step T, 0..1; none if fewer steps are run",
    "flips": "share of images whose answer differs from the step before's, 0..1; none at step 1",
    "flips_null": "null: the same if both steps' answers were independent and as frequent, 0..1; none at step 1",
    "gflops": "10^9 FLOPs of an image up to this step and the head, without QK^T and AV as in the paper;"
    " none where not known",
    "gflops_attention": "the same with QK^T and AV",
    "chance": "null: share of the most frequent class among the images, 0..1",
}


__getattr__, __dir__, __all__ = attach(__name__)
