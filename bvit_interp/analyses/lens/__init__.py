"""What does the head read in every token at every step, directly and through a tuned map?

The logit lens applies the model's own final norm and head to every token after every step. The
tuned lens puts an affine map before them, trained for each step on images that are not scored. The
table scores the predictions against the labels and the model's final prediction. Each metric has
its own null. The shuffled lens, trained on states and logits of different images, is the null of
the tuned lens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `lens`."""

    n_fit: int = 1000
    """Number of images for training the maps, without their labels. They are images that are not
    scored where `limit` leaves enough; else up to half of the chosen images, which are then not
    scored."""
    iterations: int = 50
    """Number of gradient steps per map; 0 leaves the least-squares map."""
    n_examples: int = 2
    """Number of images whose maps are kept and drawn; 0 for none."""
    seed: int = 0
    """Random seed for the pairing of states and logits in the shuffled lens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_fit < 2:
            raise UserError(f"n-fit must be >= 2, got {self.n_fit}")
        for name in ("iterations", "n_examples"):
            if getattr(self, name) < 0:
                raise UserError(f"{name.replace('_', '-')} must be >= 0, got {getattr(self, name)}")

    def resume_key(self) -> dict[str, Any]:
        """The options that rows depend on, without the number of examples."""
        return {key: value for key, value in super().resume_key().items() if key != "n_examples"}


COLUMNS = {
    "model": "checkpoint",
    "lens": "raw (logit lens), tuned (tuned lens), or shuffled (null of the tuned lens, trained on"
    " states and logits of different images)",
    "tokens": "cls (with the distillation token of a model that has one), reg or patches; answer"
    " (all tokens) of a model whose head does not read CLS alone",
    "metric": "accuracy, agreement, kl, flips, calibration_error, confidence, entropy, true_rank,"
    " exit_accuracy, map_entropy, map_correlation, pointing or object_share",
    "step": "step t, from 1; empty for exit_accuracy",
    "threshold": "threshold tau of the confidence, 0..1; for exit_accuracy only",
    "value": "share 0..1, nats (kl, entropy, map_entropy), rank from 1, or correlation -1..1",
    "low": "lower end of the 95 % interval over images: Wilson for shares of images on cls and"
    " exit_accuracy, else normal; empty where the value is not a mean over images",
    "high": "upper end of that interval",
    "null": "value expected by chance, for each metric as the method says",
    "mean_step": "mean step at which images leave; for exit_accuracy only",
    "n": "number of images; for pointing and object_share, those that show their object",
    "n_fit": "number of images the maps were trained on; none of them is scored; 0 for answer",
    "path": "file of the mean maps and the example maps, if kept",
}
QUICK: dict[str, Any] = {"n_fit": 24, "iterations": 4}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
