"""Which step causes a shared weight's gradient, do the steps agree, and does it guide pruning?

A weight applied at T steps has a gradient that is the sum of T terms, one per step. The terms are
computed exactly, compared, and used to prune the weights. Their null is the same terms with their
weights in random order. The nulls of pruning are random weights, and masks of the next step.
Confidence intervals are a jackknife over folds of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Method = Literal[
    "magnitude", "taylor", "stepwise", "step_max", "random", "own_masks", "shifted_masks"
]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `step-attribution`."""

    folds: int = 8
    """Number of parts of the images for confidence intervals; even. Half of them make masks and the
    other half scores them, and vice versa."""
    methods: tuple[Method, ...] = get_args(Method)
    """How to choose the weights to prune: magnitude |w|, taylor |w sum_t g_t|, stepwise sum_t
    |w g_t|, step_max max_t |w g_t|, random (null); where steps share weights also own_masks, a mask
    per step by |w g_t|, and shifted_masks, the masks of the next step (null)."""
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the weights to set to zero, 0..1: of all block matrices together, or of each step's
    for masks per step."""
    seed: int = 0
    """Random seed for the folds, the random order of weights and random pruning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds not in range(4, 17, 2):
            raise UserError(f"folds must be even, 4 to 16, got {self.folds}")
        if set(self.methods) - set(get_args(Method)) or len(set(self.methods)) < len(self.methods):
            allowed, given = ", ".join(get_args(Method)), ", ".join(map(str, self.methods))
            raise UserError(f"methods must be of {allowed}, each once, got {given!r}")
        if len(set(self.sparsities)) < len(self.sparsities) or not all(
            0 < share < 1 for share in self.sparsities
        ):
            raise UserError(f"sparsities must be between 0 and 1, each once, got {self.sparsities}")


COLUMNS = {
    "model": "checkpoint",
    "metric": "norm, share, taylor, owner, owner_agreement, entropy, cosine, cosine_apart,"
    " sum_ratio, accuracy or gain",
    "layer": "q, k, v, proj, fc1, fc2, vectors (biases and norms), all, head (rows of q, k, v and"
    " columns of proj) or neuron (a row of fc1 and a column of fc2)",
    "unit": "the head or neuron, from 0; empty for all of them: their mean, for owner a share",
    "block": "stored block, from 0; empty where all blocks are taken together",
    "step": "step t, from 1; for the entropy of a neuron the step that owns it",
    "other_step": "step of the other term of a cosine",
    "method": "for accuracy and gain, how the pruned weights were chosen: none (nothing is pruned),"
    " or a method of the options",
    "against": "for gain, the method it is compared with",
    "sparsity": "share of the weights set to zero, 0..1",
    "trained_steps": "steps T of the model; for a stack its blocks",
    "value": "value of the metric: norm in nats per unit of weight, cosine -1..1, gain a difference"
    " of accuracies, sum_ratio 0..T, others 0..1; squares of a head or neuron are summed first",
    "low": "lower end of the 95 % confidence interval: jackknife over folds; for accuracy Wilson's,"
    " for gain normal over images",
    "high": "upper end of the interval",
    "null": "null: terms with their weights in random order (cosine: mean of all orders); for share"
    " and taylor of a layer 1/T; for norm the norm by the choice of images alone; for"
    " owner_agreement independent owners; for accuracy and gain random weights; for own_masks"
    " shifted_masks; for none and random the most frequent class",
    "null_high": "97.5 % point of the null of a cosine; its 2.5 % point is as far below null",
    "n": "images",
}
QUICK: dict[str, Any] = {"folds": 4, "sparsities": (0.5,), "limit": 24}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
