"""Does the recurrence come to rest, return or drift when it runs on, and which of its states are
alike?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the dynamics."""

    steps: int = 48
    """Steps S to run, from 1; a stacked ViT (one of timm, or a matched `vit_rms_*`) stops at its
    last block."""
    tolerance: float = 0.01
    """Distance below which a state counts as the same again, as a share of ||z_T||; of a direction,
    of length 1."""
    state: Literal["cls", "patches"] = "cls"
    """What an image is in the participation ratio and in pairs: its CLS token, or the mean of its
    patches."""
    pair_steps: tuple[int, ...] | None = None
    """Steps compared in pairs; by default all the trained ones. One that a model was not trained
    for is left out."""
    seed: int = 0
    """Of the Gaussian matrix in the null of the Procrustes distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance must be between 0 and 1, got {self.tolerance}")
        if self.state not in ("cls", "patches"):
            raise UserError(f"state must be cls or patches, got {self.state!r}")
        if self.pair_steps is not None and (not self.pair_steps or min(self.pair_steps) < 1):
            raise UserError(f"pair-steps must be >= 1, got {self.pair_steps}")


COLUMNS = {
    "model": "checkpoint",
    "statistic": "norm, step_size, direction, cosine, to_trained, to_last, return, return_direction, period,"
    " period_direction, participation_ratio, cka, cka_debiased or procrustes",
    "tokens": "cls, reg, dist or patches; of the participation ratio and of pairs, patches are their mean",
    "step": "step t, 0 the embedded tokens",
    "other_model": "of a pair, the model of the second state",
    "other_step": "step of the state compared with; none for norm, period and participation_ratio",
    "trained_steps": "steps T the model was made for; of a stack, its blocks",
    "value": "the value: a norm in units of the tokens, a ratio, a cosine -1..1, a period in steps, CKA 0..1 (debiased"
    " also just outside), a Procrustes distance 0..2; a mean over images up to return",
    "low": "lower end of the normal 95 % interval of that mean; none for the others",
    "high": "upper end of it",
    "null": "null: the value with the second state from another image; none for norm and period",
    "n": "images",
}


__getattr__, __dir__, __all__ = attach(__name__)
