"""What does the head already read in every token at every step, raw and behind an affine map tuned
for the step?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the lens."""

    fit_images: int = 1000
    """Images the maps are trained on, without their labels: of those not scored where `limit`
    leaves as many, else up to half of the chosen ones, which are then not scored."""
    iterations: int = 50
    """Gradient steps of a map; 0 leaves it at the least squared error."""
    examples: int = 2
    """Images whose maps are kept and drawn; 0 for none."""
    seed: int = 0
    """Of the pairing of states and answers in the shuffled lens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit_images < 2:
            raise UserError(f"fit-images must be >= 2, got {self.fit_images}")
        for name in ("iterations", "examples"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be >= 0, got {getattr(self, name)}")

    def resume_key(self) -> dict[str, Any]:
        """Without how many examples are kept."""
        return {key: value for key, value in super().resume_key().items() if key != "examples"}


COLUMNS = {
    "model": "checkpoint",
    "lens": "raw, tuned, or shuffled (null: tuned on states and answers of different images)",
    "tokens": "cls (with the distillation token of a model that has one), reg or patches",
    "statistic": "top1, agreement, kl, flips, calibration_error, confidence, entropy, true_rank; exit_accuracy;"
    " map_entropy, map_correlation, pointing, object_share",
    "step": "step t, from 1; none for exit_accuracy",
    "threshold": "of exit_accuracy: tau, 0..1",
    "value": "a share 0..1, nats (kl, entropy, map_entropy), a rank from 1, or a correlation -1..1",
    "low": "lower end of the 95 % interval over images, normal (of shares of images, as top1 on cls, Wilson's); none"
    " where the value is no mean over images",
    "high": "upper end of it",
    "null": "null: the value without what is claimed, as the analysis says for each statistic",
    "mean_step": "of exit_accuracy: mean step at which images leave",
    "n": "images that count; of the pointing, those that show their object",
    "fit_images": "images the maps were trained on, none of them scored",
    "path": "file of the mean maps and the example maps, if kept",
}


__getattr__, __dir__, __all__ = attach(__name__)
