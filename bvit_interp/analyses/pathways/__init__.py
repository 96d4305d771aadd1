"""Do the steps of a pruned bViT use weights of their own?

The models have one mask per step. The table has the overlap of the masks of two steps, the share of
a step's weights that no other step uses, and the number of steps that use a weight. The nulls are
independent masks as dense as the model's. The models are also run with the masks of their steps
exchanged, and scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Empty = Literal["nan", "1", "0"]
ALL_LAYERS = "all"
"""Value of the column `layer` for the four matrices together."""
PRUNED, COLLAPSE = "fully_pruned", "collapse"
"""Values of the column `flag`."""


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `pathways`."""

    empty: Empty = "nan"
    """Specialization of an empty mask and overlap of two empty masks: nan (undefined, left out of
    means), 1 (as the paper draws them) or 0."""
    swaps: bool = False
    """Run every step on every other step's masks too: T (T - 1) runs, each from the step that is
    changed."""
    shuffles: int = 5
    """Number of random orders of the masks over the steps to run; 0 for none."""
    seed: int = 0
    """Random seed for the orders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.empty not in get_args(Empty):
            raise UserError(
                f"empty must be one of {', '.join(get_args(Empty))}, got {self.empty!r}"
            )
        if self.shuffles < 0:
            raise UserError(f"shuffles must be >= 0, got {self.shuffles}")


COLUMNS = {
    "model": "checkpoint",
    "sparsity": "mask-level sparsity of the model, 1 - mean over steps of |M_t| / |W|, 0..1",
    "metric": "accuracy; shuffled (mean accuracy with the masks in other orders); swapped (accuracy"
    " with the masks of other_step at step); mask_sparsity (of a step, or the mean over steps);"
    " weight_sparsity (share of weights in no mask); weight_sparsity_layer_mean (unweighted mean of"
    " the four matrices' weight_sparsity); least_weight_sparsity (the least that masks of these"
    " sizes can have); mean_uses (mean number of steps that use an active weight); utilisation"
    " (share of the union's weights that exactly `uses` steps use); specialization (S_t); jaccard"
    " (overlap of two steps; for all matrices their mean by size); jaccard_mean (mean overlap over"
    " pairs); collapse (rise of jaccard_mean since the next less sparse model of the run)",
    "layer": "qkv, proj, fc1, fc2, or all of them",
    "step": "step t, from 1; empty for a number over all steps",
    "other_step": "the other step of a pair, or the step whose masks are used",
    "uses": "number of steps u that use a weight; for utilisation only",
    "convention": "value given to 0 / 0: empty=nan, empty=1 or empty=0; for specialization and the"
    " overlaps only",
    "value": "value of the metric, 0..1 (mean_uses: 1..T steps; collapse: -1..1)",
    "low": "for accuracies the lower end of the 95 % confidence interval (Wilson's); for shuffled"
    " the least accurate order; empty for masks",
    "high": "upper end of the interval; for shuffled the most accurate order",
    "null": "for masks the expectation over independent masks of the same densities; for accuracies"
    " the share of the most frequent class among the images; empty where there is no null",
    "null_low": "for masks the lower end of the null's 95 % interval (each weight drawn"
    " independently); empty for accuracies",
    "null_high": "upper end of the null's interval",
    "n": "number of weights or images that the value is a share of",
    "flag": "fully_pruned: no weight is left (in both steps of a pair); collapse: the mean overlap"
    " rises beyond chance",
}


def run_of(model: str) -> str:
    """The pruning run of a model: its name up to the last "/"."""
    return model.rpartition("/")[0]


QUICK: dict[str, Any] = {"swaps": True, "shuffles": 2}
"""Options with which the answer takes seconds on the embedded data."""

DEMO_CKPT = tuple(f"checkpoints/pathways-digits-s/round-0{i}@masked" for i in (2, 4, 6))
"""Shipped models with masks of their steps."""

__getattr__, __dir__, __all__ = attach(__name__)
