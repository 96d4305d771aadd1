"""How much accuracy is left when the FFN's weights are cut to rank k?

Both FFN matrices of every block are replaced by a version of rank k, and the model is scored
without retraining. The directions kept are those of the truncated SVD (the paper's), those that
matter most for real inputs, or random ones. Random directions and the share of the most frequent
class are the nulls. A sweep continues where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Method = Literal["svd", "whitened", "random"]
ALL_STEPS = "all"
"""Value of the column `step` where every step is cut."""


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `rank-sweep`."""

    ranks: tuple[int, ...] | None = None
    """Ranks to cut to; by default the paper's, in proportion to the model's width."""
    methods: tuple[Method, ...] = ("svd",)
    """Directions to keep: svd (largest singular values, the paper's), whitened (least error of the
    output over real inputs), random (null)."""
    blocks: Literal["all", "each"] = "all"
    """Cut every step at once (all), or one step at a time while the others stay whole (each)."""
    n_calibration: int = 128
    """Images for the second moments of the inputs; labels are not used. They are taken from the
    images that are not scored, where `limit` leaves enough. 0 skips the output errors."""
    seed: int = 0
    """Random seed for the random directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1):
            raise UserError(f"ranks must be >= 1, got {self.ranks}")
        if (
            not self.methods
            or set(self.methods) - set(get_args(Method))
            or len(set(self.methods)) < len(self.methods)
        ):
            allowed, given = ", ".join(get_args(Method)), ", ".join(self.methods)
            raise UserError(f"methods must be one or more of {allowed}, each once, got {given!r}")
        if self.blocks not in ("all", "each"):
            raise UserError(f"blocks must be all or each, got {self.blocks!r}")
        if self.n_calibration < 0 or (self.n_calibration == 0 and "whitened" in self.methods):
            raise UserError(
                f"n-calibration must be >= 1 for whitened, else >= 0, got {self.n_calibration}"
            )

    def resume_key(self) -> dict[str, Any]:
        """The options without those by which a sweep may grow: ranks, methods and blocks."""
        return {
            key: value
            for key, value in super().resume_key().items()
            if key not in ("ranks", "methods", "blocks")
        }


COLUMNS = {
    "model": "checkpoint",
    "method": "svd, whitened (least error of the output over real inputs) or random (null: random"
    " directions)",
    "step": "all, or the only step that is cut",
    "rank": "rank k of both FFN matrices",
    "share": "k / full rank, 0..1",
    "accuracy": "share of images classified correctly, 0..1",
    "low": "lower end of Wilson's 95 % confidence interval",
    "high": "upper end of the interval",
    "n": "images scored",
    "energy_fc1": "share of the in-projection's squared Frobenius norm kept (svd: share of its"
    " squared singular values), mean over distinct weights, 0..1",
    "energy_fc2": "share of the out-projection's squared Frobenius norm kept, 0..1",
    "error_fc1": "E||W x - W_k x||^2 / E||W x||^2 of the in-projection, over its inputs in the"
    " uncut model at the steps cut, mean over distinct weights, 0..1; empty without calibration",
    "error_fc2": "relative squared error of the out-projection's output, 0..1",
    "n_calibration": "images that E is taken over",
    "calibration_scored": "share of the calibration images that are also scored, 0..1",
    "chance": "null: share of the most frequent class among the images, 0..1",
}
QUICK: dict[str, Any] = {"ranks": (4, 16)}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
