"""How much accuracy is left when the FFN's weights are cut to rank k?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Method = Literal["svd", "whitened", "random"]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the rank sweep."""

    ranks: tuple[int, ...] | None = None
    """Ranks to cut to; by default the paper's, in proportion to the model's width."""
    methods: tuple[Method, ...] = ("svd",)
    """Which k directions to keep: svd (the paper's), whitened (those real inputs use), random
    (null)."""
    blocks: Literal["all", "each"] = "all"
    """Cut every step, or each step in turn with the others whole."""
    calibration_images: int = 128
    """Images the inputs' second moments are taken over, of those not scored where `limit` leaves
    enough; without their labels. 0 leaves the output errors out."""
    seed: int = 0
    """Of the random directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1):
            raise UserError(f"ranks must be >= 1, got {self.ranks}")
        if (
            not self.methods
            or set(self.methods) - set(get_args(Method))
            or len(set(self.methods)) < len(self.methods)
        ):
            allowed = ", ".join(get_args(Method))
            raise UserError(
                f"methods must be one or more of {allowed}, each once, got {', '.join(self.methods)!r}"
            )
        if self.blocks not in ("all", "each"):
            raise UserError(f"blocks must be all or each, got {self.blocks!r}")
        if self.calibration_images < 0 or (
            self.calibration_images == 0 and "whitened" in self.methods
        ):
            raise UserError(
                f"calibration-images must be >= 1 for whitened, else >= 0, got {self.calibration_images}"
            )

    def resume_key(self) -> dict[str, Any]:
        """Without what a sweep may be continued with more of."""
        return {
            k: value
            for k, value in super().resume_key().items()
            if k not in ("ranks", "methods", "blocks")
        }


COLUMNS = {
    "model": "checkpoint",
    "method": "svd, whitened (least error of the output over real inputs) or random (null: random directions)",
    "step": "all, or the only step that is cut",
    "rank": "rank k both FFN matrices are cut to",
    "share": "k / full rank, 0..1",
    "accuracy": "share of images classified right, 0..1",
    "low": "lower end of Wilson's 95 % interval",
    "high": "upper end of it",
    "n": "images",
    "energy_fc1": "share of the in-projection's squared Frobenius norm kept (svd: of its squared singular values),"
    " mean over distinct weights, 0..1",
    "energy_fc2": "the same in the out-projection",
    "error_fc1": "E||W x - W_k x||^2 / E||W x||^2 of the in-projection over the uncut model's inputs at the steps cut,"
    " mean over distinct weights, 0..1; none without calibration",
    "error_fc2": "the same in the out-projection",
    "calibration_images": "images that E is over",
    "calibration_scored": "share of them that are also scored, 0..1",
    "chance": "null: share of the most frequent class among the images, 0..1",
}


__getattr__, __dir__, __all__ = attach(__name__)
