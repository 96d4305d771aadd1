"""Which step is a shared weight's gradient for, do the steps agree, and does that tell which
weights to prune?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Method = Literal[
    "magnitude", "taylor", "stepwise", "step_max", "random", "own_masks", "shifted_masks"
]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the step attribution."""

    folds: int = 8
    """Parts of the images that intervals are over; even. Half of them make masks, the other half
    scores them."""
    methods: tuple[Method, ...] = get_args(Method)
    """How to choose weights: magnitude |w|, taylor |w sum_t g_t|, stepwise sum_t |w g_t|, step_max
    max_t |w g_t|, random (null); where steps share, own_masks a mask a step by |w g_t|,
    shifted_masks by the next step's (null)."""
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the weights of all block matrices together (of each step's, for masks of steps) set
    to zero, 0..1."""
    seed: int = 0
    """Of the folds, of the random order of weights and of random pruning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds not in range(4, 17, 2):
            raise UserError(f"folds must be even, 4 to 16, got {self.folds}")
        if set(self.methods) - set(get_args(Method)) or len(set(self.methods)) < len(self.methods):
            allowed = ", ".join(get_args(Method))
            raise UserError(
                f"methods must be of {allowed}, each once, got {', '.join(map(str, self.methods))!r}"
            )
        if len(set(self.sparsities)) < len(self.sparsities) or not all(
            0 < share < 1 for share in self.sparsities
        ):
            raise UserError(f"sparsities must be between 0 and 1, each once, got {self.sparsities}")


COLUMNS = {
    "model": "checkpoint",
    "statistic": "norm, share, taylor, owner, owner_agreement, entropy, cosine, cosine_apart, sum_ratio, accuracy or"
    " gain",
    "part": "q, k, v, proj, fc1, fc2, vectors (biases and norms), all, head (rows of q, k, v and columns of proj) or"
    " neuron (a row of fc1 and a column of fc2)",
    "unit": "the head or neuron, from 0; none for all of them: a mean, of owner a share of them",
    "block": "stored block, from 0; none where all are taken together",
    "step": "step t; of a neuron's entropy, its owner",
    "other_step": "step of the other term of a cosine",
    "method": "of accuracy and gain, how weights were chosen: none, or a method of the options",
    "against": "of a gain, the method compared with",
    "sparsity": "share of the weights set to zero, 0..1",
    "trained_steps": "steps T of the model; of a stack, its blocks",
    "value": "the value: norm in nats a unit of weight, cosine -1..1, gain a difference of accuracies,"
    " sum_ratio 0..T, others 0..1; a head's or neuron's squares are summed first",
    "low": "lower end of the 95 % interval: jackknife over folds; of accuracy Wilson's, of gain normal over images",
    "high": "upper end of it",
    "null": "null: terms with weights in random order (cosine: mean of all orders); of a part's share and taylor 1/T;"
    " of norm, that by choice of images alone; of owner_agreement, independent owners; of accuracy and"
    " gain, random weights; of own_masks, shifted_masks; of none and random, the most frequent class",
    "null_high": "of a cosine, the null's 97.5 % point; its 2.5 % point is as far on the other side of null",
    "n": "images",
}


__getattr__, __dir__, __all__ = attach(__name__)
