"""Which heads and neurons does the answer need, and at which step does it need them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Method = Literal["zero", "mean", "resample"]


Scope = Literal["each", "from", "all"]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the ablation."""

    images: int | None = 100
    """Images that are ablated, spread evenly over the data set, at most `limit`; the means are over
    all that are used. None for all of them."""
    methods: tuple[Method, ...] = ("zero", "mean", "resample")
    """What a unit becomes: zero, its mean, or its activation on another image (resample)."""
    scopes: tuple[Scope, ...] = ("each", "from", "all")
    """Steps at which a unit is ablated: each in turn, from each on, all."""
    groups: int = 4
    """Groups of neighbouring neurons; 0 for none."""
    seed: int = 0
    """Of the null's random channels and of the shuffles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and self.images < 1:
            raise UserError(f"images must be >= 1, got {self.images}")
        for name, literal in (("methods", Method), ("scopes", Scope)):
            given, allowed = getattr(self, name), get_args(literal)
            if not given or set(given) - set(allowed) or len(set(given)) < len(given):
                words = f"{', '.join(allowed)}, each once, got {', '.join(given)!r}"
                raise UserError(f"{name} must be one or more of {words}")
        if self.groups < 0:
            raise UserError(f"groups must be >= 0, got {self.groups}")


COLUMNS = {
    "model": "checkpoint",
    "method": "zero, mean or resample",
    "kind": "head or neurons",
    "statistic": "each, from, all, sum or excess of a unit; variance_steps, variance_units, variance_both or"
    " reliability of the table of each",
    "answer": "accuracy (share, change -1..1), logit (of the true class), log_prob (of it, nats) or kl (from the clean"
    " answer, nats)",
    "step": "the step ablated, or the first of them; none for all, sum, excess and the table's",
    "unit": "head or group of neurons, from 0; none for the table's",
    "value": "mean over images of the change; a share of variance (noise may leave it outside 0..1), a correlation",
    "low": "lower end of its 95 % interval over images: normal, of a share by the jackknife over tenths of the images",
    "high": "upper end of it",
    "null": "null: random channels of z, as many; neurons: mean over the groups; of the table: units shuffled within"
    " steps (variance_steps: steps within units)",
    "p_value": "of reliability: share of renumberings of the units, new in each tenth of the images, that give as much",
    "n": "images ablated",
}


__getattr__, __dir__, __all__ = attach(__name__)
