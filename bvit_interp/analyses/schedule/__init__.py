"""Does the model count its steps or read its state?

The steps are applied in another order: skipped, repeated, swapped, delayed or replaced, each with
its own row of the time embedding or its own block. The step is also decoded from single tokens of
held-out images, with a linear discriminant. Then the step is removed from the state of each step,
and the model runs on from there. The nulls are a guess, the most frequent class, and random changes
of the state that are as large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `schedule`."""

    runs: tuple[int, ...] = (6, 18, 24, 48)
    """Numbers of steps S to run. Only a recurrent model runs past its T steps; a time embedding
    then stays at its last row."""
    shifts: tuple[int, ...] = (1, 2, 3, 6)
    """Numbers of steps d of the delay, lag and lead; those of T and more are left out."""
    n_scored: int = 300
    """Number of images on which changed runs are scored, at most half of those used. Two thirds of
    the other images are for fitting decoders and removals, one third for fitting decoders after a
    removal; there should be many more of them than the width."""
    n_matrix: int = 100
    """Number of scored images for the T x T matrix of step s in place of step t; 0 for no
    matrix."""
    ridge: float = 0.001
    """Ridge added to the covariance of the linear discriminant, as a share of its mean diagonal."""
    seed: int = 0
    """Random seed for the split of the images and for the random directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("runs", "shifts"):
            values = getattr(self, name)
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise UserError(f"{name} must be >= 1, each once, got {' '.join(map(str, values))}")
        if self.n_scored < 1:
            raise UserError(f"n-scored must be >= 1, got {self.n_scored}")
        if self.n_matrix < 0:
            raise UserError(f"n-matrix must be >= 0, got {self.n_matrix}")
        if not 0 < self.ridge < math.inf:
            raise UserError(f"ridge must be > 0 and finite, got {self.ridge}")


COLUMNS = {
    "model": "checkpoint",
    "experiment": "schedule, decoding (of the step) or removal (of the step)",
    "variant": "for schedule: normal, skip, repeat, swap, delay, lag, lead, fixed, mean_embedding,"
    " reverse, twice, run, replace, or embedding (the rows of the time embedding themselves); for"
    " decoding: what is read, raw, direction or norm, or the state after the removal subspace or"
    " mean; for removal: subspace, mean, random_subspace, random_scaled or random_shift",
    "tokens": "for decoding and embedding: cls, reg, dist or patches, one token at a time;"
    " otherwise none",
    "step": "step t that is changed or decoded, none for all; for delay, lag and lead the number"
    " of steps d, for run S",
    "other_step": "for swap and replace, the step that takes the place of t",
    "metric": "accuracy (of classes; for decoding, of steps), accuracy_change (paired by image),"
    " agreement (with the answers of the normal run), log_prob_change (of the true class),"
    " step_error (of the decoded step), pair_accuracy (share of pairs of steps that are told apart"
    " by forced choice), distance (by which the state is moved) or length (of the row of the time"
    " embedding)",
    "value": "a share 0..1, accuracy_change -1..1, log_prob_change in nats, step_error in steps,"
    " distance and length in units of the norm of the state; a mean over images, but for length",
    "low": "lower end of its 95 % confidence interval over images: Wilson for shares of images,"
    " otherwise normal",
    "high": "upper end of the interval",
    "null": "null: for accuracy the share of the most frequent class, for decoding a guess, 1 / T;"
    " for agreement that of independent answers that are given as often; for step_error that of"
    " always the middle step; for pair_accuracy 1 / 2",
    "trained_steps": "steps T that the model was made for; for a stack, its blocks",
    "n": "number of images",
}
QUICK: dict[str, Any] = {"n_scored": 12, "n_matrix": 6, "runs": (2, 6), "shifts": (1,)}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
