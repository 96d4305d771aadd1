"""Does the maximum of a head's CLS attention lie on the object, step by step?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the pointing game."""

    saliency: Literal["attention", "rollout", "gradient-x-activation", "integrated-gradients"] = (
        "attention"
    )
    """Whose maximum points: CLS attention of each head, attention rollout up to the step, or an
    attribution of the predicted class to the tokens entering the step (one map a step; needs
    captum)."""
    target: Literal["own", "any"] = "own"
    """What is an object: the image's own class, or every annotated class."""
    point: Literal["centre", "majority"] = "centre"
    """What decides a hit: the patch's centre pixel, or whether most of the patch is object."""
    tolerance: float = 0.0
    """Radius around the point within which an object pixel counts, pixels of the input (15 in
    TorchRay)."""
    average: Literal["image", "class"] = "image"
    """Mean over images, or over the means of the classes."""
    examples: int = 3
    """Images whose maps are kept for the strip of Fig. 13; 0 for none."""
    seed: int = 0
    """Of the bootstrap and of the halves on which the best head is chosen and scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance < 0 or self.examples < 0:
            raise UserError("tolerance and examples must be >= 0")
        if self.point == "majority" and self.tolerance:
            raise UserError("tolerance goes with --point centre: a majority has no radius")


COLUMNS = {
    "model": "checkpoint",
    "saliency": "whose maximum points",
    "step": "step t, from 1",
    "head": "head from 0; all (one map a step); mean, best, best-split: over the heads of the step",
    "hit_ratio": "share of images whose point is a hit, 0..1",
    "low": "lower end of the bootstrap 95 % interval over images; best: for the head already chosen",
    "high": "upper end of it",
    "n": "images that count",
    "ignored": "images left out because the point (for the mean: of every head) is on ignored ground",
    "skipped": "images left out because the crop shows no object",
    "chance": "null: mean share of the image the object covers (--point majority: of patches mostly object), 0..1",
    "centre": "null: hit ratio of the image's centre pixel, 0..1",
    "chosen": "the head that is best at the step (best; best-split: on the first half)",
    "path": "file of the example maps, if kept",
}


__getattr__, __dir__, __all__ = attach(__name__)
