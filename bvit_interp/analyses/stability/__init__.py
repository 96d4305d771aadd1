"""Does a step stretch or damp a small change of its state, and does a run recover from a
perturbation?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the stability."""

    steps: int = 24
    """Steps S to run, from 1; a stacked ViT (one of timm, or a matched `vit_rms_*`) stops at its
    last block."""
    jacobian_images: int = 32
    """Images whose Jacobians are looked at, spread evenly over the data set; at most as many as are
    used."""
    spectra: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 18, 24)
    """Steps whose own Jacobian is looked at, beside T; one that a model does not take is left
    out."""
    leading: int = 3
    """Singular values and exponents given."""
    iterations: int = 12
    """Products with a Jacobian, and as many with its transpose, for its singular values."""
    starts: tuple[int, ...] = (1, 6)
    """Steps s after which the state is perturbed, 0 the embedded tokens; one not below a model's
    last is left out."""
    eps: tuple[float, ...] = (0.01, 0.1)
    """Size of the perturbation, as a share of ||z_s||."""
    seed: int = 0
    """Of random directions and of the null's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "jacobian_images", "leading"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if self.iterations < self.leading:
            raise UserError(
                f"iterations must be >= leading ({self.leading}), got {self.iterations}"
            )
        if min(self.spectra, default=1) < 1:
            raise UserError(f"spectra must be steps >= 1, got {self.spectra}")
        if min(self.starts, default=-1) < 0:
            raise UserError(f"starts must be steps >= 0, got {self.starts}")
        if not self.eps or not all(0 < share < math.inf for share in self.eps):
            raise UserError(f"eps must be > 0 and finite, got {self.eps}")


COLUMNS = {
    "model": "checkpoint",
    "statistic": "singular, radius, rotates, input_share, output_share, token_share, gain, state_growth, exponent,"
    " exponent_relative, tangent_share, ftle, ftle_relative, distance, direction or same_answer",
    "step": "step t: of a Jacobian J_t, of an exponent over steps 1..t, of a curve after step t; none for token_share",
    "index": "which singular value or exponent, 1 the largest; none for the others",
    "tokens": "kind of token that is read: cls, reg, dist, patches or memory; none for what is of all",
    "source": "what is perturbed: of gain a kind of token, of a curve the direction: random or partner",
    "start": "step s after which the state of a curve is perturbed",
    "eps": "size of that perturbation, a share of ||z_s||",
    "trained_steps": "steps T the model was made for; of a stack, its blocks",
    "value": "mean over images: a ratio of norms (singular, radius, gain, state_growth ||z_t|| / ||z_{t-1}||), nats a"
    " step (exponents), a share 0..1, or a distance as a share of ||z_t|| (of direction: 0..2)",
    "low": "lower end of the normal 95 % interval of that mean, of same_answer Wilson's; none for one image",
    "high": "upper end of it",
    "residual": "mean relative residual of an iterative estimate; none for the others",
    "null": "null: the value with permuted weights; of a curve, of another image's clean run; none for token_share",
    "null_low": "lower end of the normal 95 % interval of the null; of curves up to sqrt 2 too narrow, as pairs of"
    " images come both ways round",
    "null_high": "upper end of it",
    "n": "images",
}


__getattr__, __dir__, __all__ = attach(__name__)
