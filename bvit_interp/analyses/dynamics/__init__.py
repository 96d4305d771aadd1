"""Do states come to rest past T, and which are alike?

The model runs on past its trained steps. The states of each kind of token are compared from step to
step and with earlier steps. A verdict says whether they settle at a fixed point or a cycle. CKA and
Procrustes distances compare the states of every two trained steps. The null of a comparison takes
the second state from another image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `dynamics`."""

    steps: int = 48
    """Steps S to run, at least 1. A stacked ViT (one of timm, or a matched `vit_rms_*`) stops at
    its last block."""
    tolerance: float = 0.01
    """Distance below which two states count as the same, as a share of ||z_T||; for directions, the
    distance of unit vectors."""
    state: Literal["cls", "patches"] = "cls"
    """What represents an image in the participation ratio and in pairs: its CLS token, or the mean
    of its patches."""
    pair_steps: tuple[int, ...] | None = None
    """Steps that are compared in pairs; by default all trained steps. A step that a model was not
    trained for is skipped."""
    seed: int = 0
    """Random seed for the Gaussian matrix in the null of the Procrustes distance."""

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
    "metric": (
        "norm, step_size, direction_change, update_cosine, distance_to_trained, "
        "distance_to_last, return_distance, direction_return_distance, period, "
        "direction_period, participation_ratio, cka, cka_debiased or procrustes"
    ),
    "tokens": (
        "kind of token: cls, reg, dist or patches; for participation_ratio and pairs, patches "
        "means their mean"
    ),
    "step": "step t; 0 is the embedded tokens",
    "other_model": "for a pair, the model of the second state",
    "other_step": (
        "step of the state compared with; empty for norm, the two periods and participation_ratio"
    ),
    "trained_steps": "steps T that the model was made for; for a stacked ViT, its blocks",
    "value": (
        "a norm in units of the tokens, a ratio, a cosine -1..1, a period in steps, a number of "
        "directions, CKA 0..1 (debiased also slightly outside), or a Procrustes distance 0..2; "
        "a mean over images for all but the periods, participation_ratio and pairs"
    ),
    "low": (
        "lower end of the normal 95 % confidence interval of the mean; empty for metrics that "
        "are no mean over images"
    ),
    "high": "upper end of the interval",
    "null": (
        "null: the value with the second state from another image; for participation_ratio, an "
        "isotropic Gaussian's; empty for norm and the periods"
    ),
    "n": "number of images",
}
QUICK: dict[str, Any] = {}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
