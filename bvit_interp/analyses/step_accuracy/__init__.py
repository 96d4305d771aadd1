"""How accurate is the head after every step, also beyond the trained number of steps?

The model's own final norm and head read the tokens after every step, in one pass over the images.
A recurrent model continues beyond the number of steps it was trained for; a stacked ViT stops at
its last block. The null of the accuracy is the share of the most frequent class. The rank of the
true class and the flips between steps have nulls of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `step-accuracy`."""

    steps: int = 24
    """Number of steps to run; a stacked ViT (from timm, or a matched `vit_rms_*`) stops at its last
    block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")


COLUMNS = {
    "model": "checkpoint",
    "step": "step t after which the head reads the tokens, from 1",
    "trained_steps": "number of steps T the model was trained for; for a stack, its blocks",
    "n": "number of images",
    "accuracy": "share of images classified correctly, 0..1",
    "low": "lower end of the 95 % Wilson interval of the accuracy",
    "high": "upper end of that interval",
    "top5_accuracy": "share of images whose class is among the five largest logits, 0..1;"
    " empty for fewer than 5 classes",
    "loss": "mean cross-entropy, nats",
    "confidence": "mean of the largest softmax probability, 0..1",
    "entropy": "mean entropy of the softmax, nats",
    "true_rank": "mean rank of the true class among the logits, from 1 (largest) to C",
    "true_rank_null": "null of the rank: its mean for logits in random order, (C + 1) / 2",
    "agreement": "share of images with the same prediction as step T, 0..1;"
    " empty if fewer than T steps are run",
    "flips": "share of images whose prediction differs from the previous step, 0..1;"
    " empty at step 1",
    "flips_null": "null of the flips: their share if both steps predicted independently with the"
    " same class frequencies, 0..1; empty at step 1",
    "gflops": "10^9 FLOPs per image up to this step, with the head, without QK^T and AV as in the"
    " paper; empty where not known",
    "gflops_attention": "10^9 FLOPs per image including QK^T and AV",
    "chance": "null of the accuracy: share of the most frequent class among the images, 0..1",
}
QUICK: dict[str, Any] = {}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
