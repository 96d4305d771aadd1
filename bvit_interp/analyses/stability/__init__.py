"""Does a step amplify small changes, and does a run recover?

The Jacobian of each step is analysed at real states: largest singular values, spectral radius,
gains between kinds of token. Lyapunov exponents follow along the run. Every image's state is also
perturbed and run on past the trained steps. The null is the same model with permuted weights. For
perturbed runs it is the clean run of another image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `stability`."""

    steps: int = 24
    """Steps S to run, at least 1. A stacked ViT (one of timm, or a matched `vit_rms_*`) stops at
    its last block."""
    n_jacobian: int = 32
    """Images whose Jacobians are analysed, evenly spaced over the images used; at most all of
    them."""
    jacobian_steps: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 18, 24)
    """Steps whose own Jacobian is analysed, besides step T. A step that a model does not take is
    skipped."""
    leading: int = 3
    """Number of largest singular values and exponents."""
    iterations: int = 12
    """Products with a Jacobian, and as many with its transpose, for its singular values."""
    starts: tuple[int, ...] = (1, 6)
    """Steps s after which the state is perturbed; 0 is the embedded tokens. A step that is not
    before a model's last step is skipped."""
    eps: tuple[float, ...] = (0.01, 0.1)
    """Size of the perturbation, as a share of ||z_s||."""
    seed: int = 0
    """Random seed for directions and for the permuted weights of the null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "n_jacobian", "leading"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if self.iterations < self.leading:
            raise UserError(
                f"iterations must be >= leading ({self.leading}), got {self.iterations}"
            )
        if min(self.jacobian_steps, default=1) < 1:
            raise UserError(f"jacobian-steps must be >= 1, got {self.jacobian_steps}")
        if min(self.starts, default=-1) < 0:
            raise UserError(f"starts must be steps >= 0, got {self.starts}")
        if not self.eps or not all(0 < share < math.inf for share in self.eps):
            raise UserError(f"eps must be > 0 and finite, got {self.eps}")


COLUMNS = {
    "model": "checkpoint",
    "metric": (
        "singular_value, spectral_radius, complex_eigenvalue, input_share, output_share, gain, "
        "state_growth, lyapunov_exponent, lyapunov_exponent_relative, tangent_share, ftle, "
        "ftle_relative, distance, direction_distance, same_prediction or token_share"
    ),
    "step": (
        "step t: of a Jacobian J_t, of an exponent over steps 1..t, or of a perturbed run; "
        "empty for token_share"
    ),
    "index": "number of the singular value or exponent, 1 is the largest; empty for other metrics",
    "tokens": (
        "kind of token that is read: cls, reg, dist, patches or memory; empty for metrics of "
        "all tokens"
    ),
    "source": (
        "what is perturbed: for gain a kind of token; for perturbed runs the direction, random "
        "or partner"
    ),
    "start": "step s after which the state of a perturbed run is moved",
    "eps": "size of that perturbation, as a share of ||z_s||",
    "trained_steps": "steps T that the model was made for; for a stacked ViT, its blocks",
    "value": (
        "mean over images: a ratio of norms (singular_value, spectral_radius, gain, "
        "state_growth), nats per step (exponents), a share 0..1, a distance as a share of "
        "||z_t||, or a distance of unit vectors 0..2"
    ),
    "low": (
        "lower end of the 95 % confidence interval of the mean: normal, for same_prediction "
        "Wilson's; empty for one image"
    ),
    "high": "upper end of the interval",
    "residual": "mean relative residual of an iterative estimate; empty for other metrics",
    "null": (
        "null: the value with permuted weights; for perturbed runs, the clean run of another "
        "image; empty for token_share"
    ),
    "null_low": (
        "lower end of the normal 95 % confidence interval of the null; for perturbed runs up to "
        "sqrt 2 too narrow, as each pair of images occurs in both orders"
    ),
    "null_high": "upper end of that interval",
    "n": "number of images",
}
QUICK: dict[str, Any] = {
    "n_jacobian": 2,
    "steps": 5,
    "jacobian_steps": (1,),
    "leading": 2,
    "iterations": 3,
    "limit": 12,
}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
