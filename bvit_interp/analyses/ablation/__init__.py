"""Which heads and neurons does the answer need, and at which step?

Each head, and each group of neighbouring neurons, is replaced by zero, by its mean over images, or
by its value on another image. This is done at one step, from a step on, or at all steps. The table
has the change of accuracy, of the true class's logit and log-probability, and the KL divergence
from the clean answer. The null of a head is the ablation of as many random channels. A second null
is a change of the state that is as large, in a random direction. A two-way analysis of variance
shows how much of the effect depends on the step, on the unit, and on both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Method = Literal["zero", "mean", "resample"]
Scope = Literal["each", "from", "all"]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `ablation`."""

    n_ablated: int | None = 100
    """Number of images to ablate, evenly spaced over the data set and at most `limit`. The means of
    mean ablation are over all images. None for all."""
    methods: tuple[Method, ...] = ("zero", "mean", "resample")
    """Replacement of a unit: zero, its mean, or its activation on another image (resample)."""
    scopes: tuple[Scope, ...] = ("each", "from", "all")
    """Steps of the ablation: each step alone, from each step on, all steps."""
    groups: int = 4
    """Number of groups of neighbouring neurons; 0 for none."""
    norm_draws: int = 1
    """Number of random directions per image, unit and step for `norm_null`; 0 for none."""
    seed: int = 0
    """Random seed for the channels and directions of the nulls, and for permutations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_ablated is not None and self.n_ablated < 1:
            raise UserError(f"n-ablated must be >= 1, got {self.n_ablated}")
        for name, literal in (("methods", Method), ("scopes", Scope)):
            given, allowed = getattr(self, name), get_args(literal)
            if not given or set(given) - set(allowed) or len(set(given)) < len(given):
                words = f"{', '.join(allowed)}, each once, got {', '.join(given)!r}"
                raise UserError(f"{name} must be one or more of {words}")
        if self.groups < 0:
            raise UserError(f"groups must be >= 0, got {self.groups}")
        if self.norm_draws < 0:
            raise UserError(f"norm-draws must be >= 0, got {self.norm_draws}")


COLUMNS = {
    "model": "checkpoint",
    "method": "zero, mean or resample",
    "site": "z (units are heads) or mlp_post (units are groups of neurons)",
    "scope": "steps of the ablation of a unit: each, from, all, sum or excess; or a statistic of"
    " the table of each: variance_steps, variance_units, variance_interaction, reliability or"
    " reliability_interaction",
    "metric": "accuracy (0..1), logit or log_prob (of the true class; nats), all three as changes;"
    " kl (from the clean answer, nats); or, for a statistic of the table, log_kl",
    "step": "the ablated step, for from the first one; none for the other scopes",
    "unit": "head or group of neurons, from 0; none for a statistic of the table",
    "value": "mean change over images; a share of variance (noise may put it outside 0..1); or a"
    " correlation",
    "low": "lower end of the 95 % interval over images: normal; for a share of variance, by the"
    " jackknife over ten folds",
    "high": "upper end of the interval",
    "null": "head: as many random channels of z; neurons: mean over the groups; share of variance:"
    " units shuffled within each step (variance_steps: steps shuffled within each unit)",
    "norm_null": "for each: mean change if the residual stream moves as far, token by token, in a"
    " random direction",
    "p_value": "for reliability and reliability_interaction: share of permutations of the units"
    " with at least that correlation",
    "p_holm": "p_value after Holm's correction for all such tests of the model",
    "n": "number of ablated images",
}


def drawn_method(methods: Collection[str]) -> str:
    """The method that the figure and the summary show: mean if it is there, else the first."""
    return "mean" if "mean" in methods else next(iter(methods))


QUICK: dict[str, Any] = {"groups": 2, "n_ablated": 6, "limit": 24}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
