"""Do the steps of a pruned bViT use weights of their own?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Empty = Literal["nan", "1", "0"]


ALL = "all"


PRUNED, COLLAPSE = "fully_pruned", "collapse"


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the pathways."""

    empty: Empty = "nan"
    """S_t of an empty mask and the overlap of two: nan (none, left out of means), 1 (as the paper
    draws it) or 0."""
    swaps: bool = False
    """Run every step on every other step's masks too: T (T - 1) runs, each from the step that is
    changed."""
    shuffles: int = 5
    """Random orders of the masks over the steps to run; 0 for none."""
    seed: int = 0
    """Of the orders."""

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
    "statistic": "accuracy; shuffled (its mean with the masks in other orders); swapped (accuracy with the masks of"
    " other_step at step); mask_sparsity (of a step, or the mean over steps); weight_sparsity (share of weights in no"
    " mask) and weight_sparsity_layer_mean (mean of the four matrices', regardless of size); least_weight_sparsity"
    " (the least that masks of these sizes can have); mean_uses (mean number of steps using an active weight);"
    " utilisation (share of the union's weights that exactly `uses` steps use); specialization (S_t); jaccard (of two"
    " steps; of all matrices the mean by size); jaccard_mean (its mean over pairs); collapse (rise of jaccard_mean"
    " since the next less sparse model of the run)",
    "component": "qkv, proj, fc1, fc2, or all of them",
    "step": "step t, from 1; none for a number of all steps",
    "other_step": "the other step of a pair, or the one whose masks are used",
    "uses": "number of steps u that use a weight; of utilisation alone",
    "convention": "value given to 0 / 0: empty=nan, empty=1 or empty=0; of specialization and jaccard alone",
    "value": "the statistic, 0..1 (mean_uses: steps, 1..T; collapse: -1..1)",
    "null": "of masks: expected of independent masks of the same densities; of accuracies: share of the most frequent"
    " class among the images; none where there is nothing to expect",
    "low": "lower end of a 95 % interval: of masks that of the null (each weight drawn by itself), of accuracies"
    " Wilson's of the value; of shuffled the least accurate order",
    "high": "upper end of it; of shuffled the most accurate order",
    "n": "what the value is a share of: weights, or images",
    "flag": "fully_pruned: no weight is left (of both steps of a pair); collapse: the mean overlap rises beyond chance",
}


def run_of(name: str) -> str:
    """The pruning run a model is of: its name up to the last "/"."""
    return name.rpartition("/")[0]


__getattr__, __dir__, __all__ = attach(__name__)
