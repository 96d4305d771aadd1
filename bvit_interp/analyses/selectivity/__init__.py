"""Which classes is each head and neuron selective for, step by step?

The response of a neuron to an image is its mean over the patches; that of a head is the mean norm
of its output over the patches. Class selectivity is the debiased share of the variance of the
response that lies between classes; onset and offset are the first and the last step at which a unit
is selective. The profile of a unit is its mean response to each class; profiles are compared
between steps, and between two halves of the images. The nulls are random groups of images in place
of classes, and the profile of another unit. Some units are ablated, beside random units, and get a
page in the report.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

RANKED = {"onset": True, "offset": False, "profile_change": True, "profile_stability": True}
"""Metrics by which units are ranked, and whether the largest value comes first."""
UNIT_NAMES = {"z": "head", "mlp_post": "neuron"}
"""Site -> what a unit of it is called."""
_UNIT = re.compile(r"(mlp_post|z):\d+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `selectivity`."""

    units: tuple[str, ...] = ()
    """Units to describe in full, for example mlp_post:374 (a neuron) or z:2 (a head). By default
    the first units of each ranked list."""
    count: int = 1
    """Number of units to describe from each ranked list, for heads and for neurons. The lists are:
    latest onset, earliest offset, largest change of profile, most stable profile."""
    threshold: float = 0.1
    """Least class selectivity of a selective unit, 0..1."""
    min_lifetime: int = 3
    """Least number of steps at which a unit must be selective to be in a ranked list."""
    n_top: int = 3
    """Number of top images per described unit and step."""
    profile_classes: int = 10
    """Number of classes of a described unit's profile in the table: those whose means vary most
    over the steps. The .npz file has all classes."""
    n_ablated: int = 100
    """Number of images on which units are ablated, evenly spaced over those used."""
    zero: bool = False
    """Ablate a unit to zero instead of its mean over the images at that step and token."""
    random_units: int = 3
    """Number of random heads and of random neurons to ablate for comparison."""
    seed: int = 0
    """Random seed for the halves and groups of images and for the random units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one = (
            "count",
            "min_lifetime",
            "n_top",
            "profile_classes",
            "n_ablated",
            "random_units",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold must be 0 or more and below 1, got {self.threshold}")
        for unit in self.units:
            if not _UNIT.fullmatch(unit):
                raise UserError(
                    f"units must look like mlp_post:374 (a neuron) or z:2 (a head), got {unit!r}"
                )
        pairs = (unit.split(":") for unit in self.units)
        if len({(site, int(number)) for site, number in pairs}) < len(self.units):
            raise UserError(f"a unit is given twice: {', '.join(self.units)}")


COLUMNS = {
    "model": "checkpoint",
    "site": "mlp_post (the unit is a neuron) or z (a head); none for the accuracy of the model",
    "unit": "number of the unit, from 0; none for a number over all units of the site",
    "step": "step t, from 1; none for a number over all steps, and for ablation at every step",
    "window": "for window_r and window_r_corrected: number of steps between the two profiles (1,"
    " T / 2 and T - 1); none for the others",
    "metric": "for every unit: selectivity, onset, offset, lifetime (steps at which it is"
    " selective), profile_change (between successive steps), profile_change_ends (between onset"
    " and offset), profile_stability, share_class, share_step, share_interaction, reliability; for"
    " described units also firing (share of patches where a neuron is above 0), class_mean,"
    " max_response, ablation_accuracy and ablation_logit (change of the true class's logit minus"
    " the mean logit); without a unit: the mean of a metric over units (not of profile_change_ends,"
    " whose windows differ), selective_share (share of selective units), window_r (correlation of"
    " the profiles of `step` and `window` steps later, from different halves of the images, mean"
    " over the units that are selective at both), window_r_corrected (divided by the root of the"
    " product of the two reliabilities, both at least 0.3), and accuracy of the model on the images"
    " of the ablation",
    "class": "for selectivity the class of the largest mean; for class_mean the class",
    "value": "value of the metric: steps for onset, offset and lifetime; 1 - r, 0..2, for changes"
    " of profile; r, -1..1, for profile_stability, reliability and window_r (above 1 by chance if"
    " corrected); logits for ablation_logit; activations for class_mean and max_response; otherwise"
    " a share, 0..1",
    "low": "lower end of a 95 % confidence interval: over images for selectivity, firing and"
    " ablation (normal) and accuracy (Wilson), over units for selective_share (Wilson) and means"
    " (bootstrap); none for the others",
    "high": "upper end of the interval",
    "null": "null: for selectivity, selective_share and shares, random groups of images in place"
    " of classes; for profiles and reliability, the profile of the next unit; for ablation, random"
    " units; for class_mean, the mean over classes; none for the others",
    "n": "number of images; for means over units and selective_share, of units",
    "rank": "rank of the unit, from 1, by onset (latest first), offset (earliest first),"
    " profile_change or profile_stability (largest first), among units selective at `min_lifetime`"
    " steps or more",
    "top_images": "top-k images of max_response as IMAGE:ROW,COLUMN: number in the data set and"
    " strongest patch",
    "path": "for max_response: PNG of these images, one row per step, with the patch framed; for"
    " means over units: .npz with the class means and firing rates of all units",
}
QUICK: dict[str, Any] = {"n_ablated": 6, "random_units": 1}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
