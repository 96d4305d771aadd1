"""Does the model count its steps or read its state: skipped, repeated, swapped and delayed steps, a
wrong clock?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the clock."""

    runs: tuple[int, ...] = (6, 18, 24, 48)
    """Numbers of steps S to run; past T only a recurrent model goes on (a time embedding stays at
    its last row)."""
    shifts: tuple[int, ...] = (1, 2, 3, 6)
    """Numbers of steps d of delay, lag and lead; those of T and more are left out."""
    scored: int = 300
    """Images that are run and scored, at most half of those used. Of the others, which should be
    many more than the width, two thirds are what probes and removals are fitted to, one third the
    probes after a removal."""
    matrix_images: int = 100
    """Images, of those scored, for the T x T matrix of step s in the place of step t; 0 for
    none."""
    ridge: float = 0.001
    """Added to the covariance of the linear discriminant, as a share of its mean diagonal."""
    seed: int = 0
    """Of the split of the images and of the random directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("runs", "shifts"):
            values = getattr(self, name)
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise UserError(f"{name} must be >= 1, each once, got {' '.join(map(str, values))}")
        if self.scored < 1 or self.matrix_images < 0:
            raise UserError(
                f"scored must be >= 1 and matrix-images >= 0, got {self.scored} and {self.matrix_images}"
            )
        if not 0 < self.ridge < math.inf:
            raise UserError(f"ridge must be > 0 and finite, got {self.ridge}")


COLUMNS = {
    "model": "checkpoint",
    "part": "schedule, reading or removal",
    "kind": "of schedule: normal, skip, repeat, swap, delay, lag, lead, fixed, mean_row, reverse, again, run, put or"
    " row (the time embedding itself); of reading: what is read, raw, direction or norm, or the state after the removal"
    " subspace or mean; of removal: subspace, mean, random_subspace, random_scaled or random_shift",
    "tokens": "of reading: cls, reg, dist or patches, one token at a time; else none",
    "step": "step t that is changed or read, none for all; of delay, lag and lead the number of steps d, of run S",
    "other": "of swap and put, the step that takes the place of t",
    "measure": "accuracy (of classes; in reading, of steps), change (of accuracy, paired by image), agreement (with the"
    " normal run's answers), log_prob (change of the true class's), error (of the step read), order (share of pairs of"
    " steps told apart by forced choice), distance (by which the state is moved) or length (of the row)",
    "value": "a share 0..1, a change of one -1..1, log_prob in nats, error in steps, distance and length in units of"
    " the state's own norm; a mean over images but length",
    "low": "lower end of its 95 % interval over images: Wilson's of shares of images, else normal",
    "high": "upper end of it",
    "null": "null: of accuracy the share of the most frequent class, in reading a guess, 1 / T; of agreement that of"
    " independent answers given as often; of error that of always reading the middle step; of order 1 / 2",
    "trained_steps": "steps T the model was made for; of a stack, its blocks",
    "n": "images",
}


__getattr__, __dir__, __all__ = attach(__name__)
