"""How much does early exit save, and what does it cost in accuracy?

Classifiers read the CLS token after chosen steps of the frozen model; `early-exit train` makes
them. An image leaves at the first classifier whose confidence exceeds a threshold, else the model's
own head classifies it. The table gives accuracy, FLOPs and measured time for every threshold. The
null of an accuracy is that of as many images leaving at each exit, but drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `early-exit`."""

    exits: tuple[Path, ...] = (Path("runs/exits"),)
    """Folders with the exits of each checkpoint, in the order of --ckpt."""
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Confidence thresholds, 0..1, whose time is measured; the curve has 51 more."""
    n_timed: int = 256
    """Number of images for measuring time; 0 to measure none."""
    timed_batch: int = 32
    """Images per batch for measuring time; all of them where there are fewer."""
    timed_curve: bool = False
    """Measure the time of the 51 thresholds of the curve too; each takes as long as one of
    `thresholds`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.thresholds or not all(0 <= tau <= 1 for tau in self.thresholds):
            raise UserError(f"thresholds must be in 0..1, got {self.thresholds}")
        if self.n_timed < 0 or self.timed_batch < 1:
            raise UserError("n-timed must be >= 0 and timed-batch >= 1")


COLUMNS = {
    "model": "checkpoint",
    "table": "threshold: one of `thresholds`, whose time is measured; curve: a threshold of the"
    " curve; exit: one classifier on all images; class: the images of one class",
    "threshold": "threshold tau of the confidence, 0..1; empty for an exit",
    "exit": "step that the classifier reads; for exits only",
    "class": "name of the class; for classes only",
    "accuracy": "share of images classified correctly, 0..1",
    "low": "lower end of the 95 % Wilson interval of the accuracy",
    "high": "upper end of that interval",
    "accuracy_null": "null: expected accuracy if as many images left at each exit, but drawn at"
    " random, 0..1",
    "share": "share of images that leave at the exit at the middle threshold, 0..1; for exits only",
    "mean_step": "mean step at which images leave",
    "gflops": "10^9 FLOPs per image of the steps run and the classifiers read, without QK^T and AV"
    " as in the paper",
    "gflops_attention": "10^9 FLOPs per image including QK^T and AV",
    "saved_flops": "1 - gflops_attention / that of a plain forward",
    "latency_ms": "measured time per image, ms; empty where not measured",
    "saved_time": "1 - measured time / that of a plain forward in the same turn, median of turns",
    "auroc": "area under the ROC curve of the confidence, correct against wrong predictions; null"
    " 0.5; for exits only",
    "calibration_error": "expected calibration error, 15 bins, 0..1; for exits only",
    "n": "number of images",
}
QUICK: dict[str, Any] = {"n_timed": 8, "timed_batch": 4}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
