"""How much is saved when an image leaves as soon as a classifier is sure, and what does it cost in
accuracy?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the early exit."""

    exits: tuple[Path, ...] = (Path("runs/exits"),)
    """Folder of exits of each checkpoint, in the order of --ckpt."""
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Confidences 0..1 whose time is measured; the curve has 51 beside them."""
    timed_images: int = 256
    """Images of a measured time; 0 measures none."""
    timed_batch: int = 32
    """Images at once in a measured time; all, where there are fewer."""
    timed_curve: bool = False
    """Measure the time of the 51 thresholds of the curve too, each as long as one of
    `thresholds`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.thresholds or not all(0 <= tau <= 1 for tau in self.thresholds):
            raise UserError(f"thresholds must be in 0..1, got {self.thresholds}")
        if self.timed_images < 0 or self.timed_batch < 1:
            raise UserError("timed-images must be >= 0 and timed-batch >= 1")


COLUMNS = {
    "model": "checkpoint",
    "kind": "threshold (measured), curve, exit (a classifier alone, on all images) or class (its own images)",
    "threshold": "tau, 0..1; none for a classifier alone",
    "exit": "step of the classifier; none for a threshold",
    "class": "name of the class; none but for a class",
    "accuracy": "share of images classified right, 0..1",
    "low": "lower end of Wilson's 95 % interval of it",
    "high": "upper end of it",
    "accuracy_null": "null: expected if as many images left at each exit, drawn at random, 0..1",
    "share": "of an exit: share of images that leave there at the middle threshold, 0..1",
    "mean_step": "mean step at which images leave",
    "gflops": "10^9 FLOPs an image, steps run and classifiers read, without QK^T and AV as in the paper",
    "gflops_attention": "the same with QK^T and AV",
    "saved_flops": "1 - gflops_attention / that of a plain forward",
    "ms": "measured time an image, ms",
    "saved_time": "1 - measured time / that of a plain forward in the same turn, median of turns",
    "auroc": "of an exit: area under the ROC curve of its confidence, right against wrong answers; null 0.5",
    "calibration_error": "of an exit: expected calibration error, 15 bins, 0..1",
    "n": "images",
}


__getattr__, __dir__, __all__ = attach(__name__)
