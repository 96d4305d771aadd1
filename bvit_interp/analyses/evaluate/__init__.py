"""How accurate is the model, and how well calibrated is its confidence?

Each model classifies the images once. The table gives top-1 and top-5 accuracy, cross-entropy and
the expected calibration error. The null of an accuracy is the share of the most frequent class, or
of the five most frequent. The figure draws the accuracies and the reliability diagram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `evaluate`."""

    bins: int = 15
    """Number of equal-width bins of the confidence, for the calibration error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 1:
            raise UserError(f"bins must be >= 1, got {self.bins}")


COLUMNS = {
    "model": "checkpoint; NAME@ema are its averaged weights",
    "bin": "all for all images, or the number of a confidence bin, 1 for the least confident;"
    " empty bins have no row",
    "n": "number of images",
    "accuracy": "share of images classified correctly, 0..1",
    "low": "lower end of the 95 % Wilson interval of the accuracy",
    "high": "upper end of that interval",
    "top5_accuracy": "share of images whose class is among the five largest logits, 0..1;"
    " empty for fewer than 5 classes",
    "loss": "mean cross-entropy, nats",
    "confidence": "mean of the largest softmax probability, 0..1",
    "calibration_error": "expected calibration error, 0..1",
    "chance": "null of the accuracy: share of the most frequent class among the images, 0..1",
    "top5_chance": "null of the top-5 accuracy: share of the five most frequent classes, 0..1",
}

WITH_AVERAGED_WEIGHTS = True
"""The command also evaluates the averaged weights of a checkpoint that has them."""
QUICK: dict[str, Any] = {}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
