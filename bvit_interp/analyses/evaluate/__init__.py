"""How often is the model right, and how well does it know?"""

from __future__ import annotations

from dataclasses import dataclass

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the evaluation."""

    bins: int = 15
    """Bins of equal width of the confidence, for the calibration error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 1:
            raise UserError(f"bins must be >= 1, got {self.bins}")


COLUMNS = {
    "model": "checkpoint; NAME@ema are its averaged weights",
    "bin": "all images, or bin of the confidence from 1 (the least confident); bins without images have no row",
    "n": "images",
    "top1": "share of images classified right, 0..1",
    "low": "lower end of Wilson's 95 % interval of it",
    "high": "upper end of it",
    "top5": "share whose class is among the five of the largest logits, 0..1; none for fewer than 5 classes",
    "loss": "mean cross-entropy, nats",
    "confidence": "mean of the largest softmax probability, 0..1",
    "calibration_error": "expected calibration error, 0..1",
    "chance": "null of top1: share of the most frequent class among the images, 0..1",
    "chance5": "null of top5: share of the five most frequent classes, 0..1",
}


__getattr__, __dir__, __all__ = attach(__name__)
