"""Does the maximum of a head's CLS attention lie on the object, step by step?

A hit is an image where the patch of the largest attention lies on the object of the image's class.
The hit ratio is the share of hits, for each step and head. The gain is what is left of it without
the hits that the same points have on the objects of other images. Further nulls are untrained
weights, the brightest patch, the image's centre and the area of the object. The best head is also
chosen on one half of the images and scored on the other, since a maximum over heads is optimistic.
The images need masks. Some maps are stored beside the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `pointing-game`."""

    limit: int | None = None
    """Number of images to use, evenly spaced over the data set; by default all, for
    integrated-gradients 100."""
    saliency: Literal["attention", "rollout", "gradient-x-activation", "integrated-gradients"] = (
        "attention"
    )
    """Saliency map whose maximum is the point: CLS attention of each head, attention rollout up to
    the step, or an attribution of the predicted class to the tokens that enter the step (one map
    per step; needs captum)."""
    target: Literal["own", "any"] = "own"
    """Object to hit: that of the image's own class, or of any annotated class."""
    point: Literal["centre", "majority"] = "centre"
    """Criterion of a hit: the patch's centre pixel is on the object, or most of the patch is."""
    tolerance: float = 0.0
    """Radius around the point within which an object pixel counts, in pixels of the input (15 in
    TorchRay)."""
    average: Literal["image", "class"] = "image"
    """Mean over images, or mean over the means of the classes."""
    n_examples: int = 3
    """Number of images whose maps are stored and drawn (Fig. 13); 0 for none."""
    untrained: bool = True
    """Score the same model with random weights too, as a null; this doubles the time."""
    seed: int = 0
    """Random seed for the bootstrap, for the halves that choose and score the best head, and for
    the weights of the untrained model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance < 0 or self.n_examples < 0:
            raise UserError("tolerance and n-examples must be >= 0")
        if self.point == "majority" and self.tolerance:
            raise UserError("tolerance needs --point centre: a majority has no radius")


COLUMNS = {
    "model": "checkpoint",
    "saliency": "saliency map whose maximum is the point",
    "step": "step t, from 1",
    "head": "head, from 0; all (one map per step); mean, best, best-split: over the heads of the"
    " step",
    "hit_ratio": "share of images whose point is a hit, 0..1",
    "low": "lower end of the bootstrap 95 % confidence interval over images; best: the head stays"
    " the chosen one",
    "high": "upper end of the interval",
    "gain": "hit_ratio - other_masks: hits that are due to the image itself",
    "gain_low": "lower end of the bootstrap 95 % confidence interval of the gain over images, which"
    " count both as images and as masks of other images",
    "gain_high": "upper end of the interval of the gain",
    "n": "number of images scored",
    "n_ignored": "images left out because the point is on an ignored pixel (mean: of every head)",
    "n_skipped": "images left out because no object is inside the crop",
    "chance": "null: mean share of the image that the object covers, 0..1 (--point majority: share"
    " of the patches that are mostly object)",
    "centre_hit_ratio": "null: hit ratio of the image's centre pixel, 0..1",
    "luminance_hit_ratio": "null: hit ratio of the patch of the highest mean luminance, 0..1",
    "contrast_hit_ratio": "null: hit ratio of the patch of the highest variance of luminance, 0..1",
    "other_masks": "null: hit ratio of the same points with the masks of the other images, mean"
    " over all of them; nan for a single image",
    "untrained_hit_ratio": "null: hit ratio of the same model with random weights (one draw), mean"
    " over heads",
    "untrained_gain": "null: gain of the same model with random weights, mean over heads",
    "untrained_gain_low": "lower end of the interval of the untrained gain over images",
    "untrained_gain_high": "upper end of the interval of the untrained gain",
    "chosen_head": "the best head of the step (best; best-split: on the first half of the images)",
    "path": "file of the example maps; empty if none are stored",
}
QUICK: dict[str, Any] = {}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
