"""What does each neuron and head answer to at every step: when is it born, does it die, does it
change its role?"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

_UNIT = re.compile(r"(mlp_post|z):\d+", re.ASCII)


LISTS = {"birth": True, "death": False, "role_change": True, "stability": True}
"""Unit statistics from which units are chosen, and whether the largest comes first."""


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the biographies."""

    units: tuple[str, ...] = ()
    """Units to tell in full, as mlp_post:374 (a neuron) or z:2 (a head); by default the first of
    the ranked lists."""
    count: int = 1
    """Units taken from each list and kind: latest birth, earliest death, largest role change,
    largest stability."""
    threshold: float = 0.1
    """Least selectivity of a unit that is alive, 0..1."""
    lifetime: int = 3
    """Units alive at fewer steps are in no ranked list."""
    top: int = 3
    """Images kept a unit and step: those of the largest answers."""
    profile: int = 10
    """Classes of a chosen unit's profile in the table: those whose means vary most; the .npz has
    all."""
    ablated: int = 100
    """Images on which units are ablated, spread evenly over those used."""
    zero: bool = False
    """Ablate a unit to zero, not to its mean over the images at that step and token."""
    nulls: int = 3
    """Other units of each kind ablated for comparison, drawn at random."""
    seed: int = 0
    """Of the halves and groups of images, and of the units drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("count", "lifetime", "top", "profile", "ablated", "nulls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold must be 0 or more and below 1, got {self.threshold}")
        for unit in self.units:
            if not _UNIT.fullmatch(unit):
                raise UserError(
                    f"units must be as mlp_post:374 (a neuron) or z:2 (a head), got {unit!r}"
                )
        if len(
            {(site, int(unit)) for site, unit in (each.split(":") for each in self.units)}
        ) < len(self.units):
            raise UserError(f"a unit is given twice: {', '.join(self.units)}")


COLUMNS = {
    "model": "checkpoint",
    "kind": "neuron (mlp_post) or head (z); of accuracy the model",
    "unit": "number of the unit, from 0; none for a number of all units of the kind",
    "step": "step t, from 1; none for a number of all steps, and for ablation at every step",
    "statistic": "of all units: selectivity, birth, death, lifetime (steps alive), role_change, role_change_ends (of"
    " the first and last step alive), stability, share_class, share_step, share_interaction, reliability; of chosen"
    " units also firing (share of patches where a neuron is above 0), class_mean, top (largest answer),"
    " ablation_accuracy and ablation_logit (change of the true class's logit, less the mean logit); without a unit: the"
    " mean of a statistic over units, alive (share of units), and accuracy of the model on the images of the ablation",
    "class": "of selectivity the class of the largest mean; of class_mean the class",
    "value": "the statistic: steps of birth, death and lifetime; 1 - r, 0..2, of role changes; r, -1..1, of stability"
    " and reliability; logits of ablation_logit; activations of class_mean and top; else a share, 0..1",
    "low": "lower end of a 95 % interval: over images of selectivity, firing and ablation (normal) and accuracy"
    " (Wilson), over units of alive (Wilson) and means (bootstrap); none for the others",
    "high": "upper end of it",
    "null": "null: of selectivity, alive and shares, random groups of images in place of classes; of roles and"
    " reliability, the next unit's profile; of ablation, other units; of class_mean the mean over classes; none for the"
    " others",
    "n": "images; for means over units, and alive, units",
    "rank": "place in the list of units by birth (the latest first), death (the earliest), role_change or stability"
    " (the largest), of those alive at `lifetime` steps or more",
    "top": "real images of the largest answers, IMAGE:ROW,COLUMN: number in the data set, patch where it is strongest",
    "path": "of top: PNG of these images, a row a step, the patch framed; of means: .npz of all units' class means and"
    " firing",
}


__getattr__, __dir__, __all__ = attach(__name__)
