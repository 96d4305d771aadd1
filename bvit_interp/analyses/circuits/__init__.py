"""Which heads and neurons does each step need?

Each head and each group of neurons has a gate at every step. A closed gate ablates its unit at that
step. Gates are chosen on some images, and the model with these gates is scored on others, by the KL
divergence from the whole model and by accuracy. Other conditions give a step the units of another
step, the same units at every step, or as many units at every step. The nulls are random units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

LABELS = {
    "per-step": "circuit of each step",
    "even": "own units, as many at every step",
    "all-steps": "same units at every step",
    "shuffled": "circuit of another step",
    "shuffled-units": "own number, units of another step",
    "random": "null: own number, random units",
    "even-random": "null: random units, as many at every step",
    "same-random": "null: same random units at every step",
}
"""Condition -> its name in figures."""
Method = Literal["gradient", "learned"]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `circuits`. `limit` is the number of images for scoring."""

    fractions: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2)
    """Shares of the gates that stay open, between 0 and 1."""
    methods: tuple[Method, ...] = ("gradient",)
    """Choice of the gates: gradient, learned, or both."""
    groups: int = 32
    """Number of groups of neighbouring neurons per step, each with one gate."""
    ablation: Literal["mean", "zero"] = "mean"
    """Replacement of a closed unit: its mean over the fit images at each token, or zero."""
    n_fit: int = 128
    """Number of images for means, gradients and learning, kept in memory. They are not used for
    scoring: first those that `limit` leaves out, and at most half of the data set."""
    epochs: int = 4
    """Number of passes over the fit images to learn gates."""
    draws: int = 8
    """Number of orders of the steps, and of random circuits. Fewer than 3 give no interval."""
    seed: int = 0
    """Random seed for fit images, orders and random circuits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or not all(0 < fraction < 1 for fraction in self.fractions):
            raise UserError(f"fractions must be between 0 and 1, got {self.fractions}")
        allowed, given = get_args(Method), self.methods
        if not given or set(given) - set(allowed) or len(set(given)) < len(given):
            words = f"{', '.join(allowed)}, each once, got {', '.join(given)!r}"
            raise UserError(f"methods must be one or more of {words}")
        if self.ablation not in ("mean", "zero"):
            raise UserError(f"ablation must be mean or zero, got {self.ablation!r}")
        for name in ("groups", "n_fit", "epochs", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")

    def resume_key(self) -> dict[str, Any]:
        """The options that rows depend on; a sweep may continue with more fractions or methods."""
        return {
            key: value
            for key, value in super().resume_key().items()
            if key not in ("fractions", "methods")
        }


COLUMNS = {
    "model": "checkpoint",
    "method": "choice of the gates: gradient or learned; none for the whole model",
    "fraction": "share of the gates of each site that stay open, 0..1",
    "condition": "full (the whole model), per-step, even, all-steps, shuffled, shuffled-units,"
    " random, even-random or same-random",
    "draw": "number of the draw, from 1, of a condition that is drawn at random; draws of one"
    " number share the order of the steps, or the random numbers; all for the mean over draws, and"
    " for any other row",
    "site": "z (gates of heads) or mlp_post (gates of groups of neurons) at one step; all for the"
    " rows of a whole condition",
    "step": "step t of the gates; all for the rows of a whole condition",
    "kl": "mean KL(whole model || gated model) over images and draws, nats",
    "kl_low": "lower end of the 95 % interval of kl: over draws and images for a mean over draws"
    " (none for fewer than 3), otherwise over images (normal)",
    "kl_high": "upper end of the interval",
    "excess": "mean of the KL minus that of the per-step circuit on the same image, nats; none for"
    " per-step and full",
    "excess_low": "lower end of the 95 % interval of excess, over the same as that of kl",
    "excess_high": "upper end of the interval",
    "accuracy": "share of images classified right, mean over draws, 0..1",
    "low": "lower end of the 95 % interval of accuracy, over the same as that of kl; for full,"
    " Wilson's",
    "high": "upper end of the interval",
    "agreement": "share of images with the whole model's answer, mean over draws, 0..1",
    "chance": "null of accuracy: share of the most frequent class among the images, 0..1",
    "kept": "share of the step's gates that are open, 0..1",
    "kept_null_low": "null: lower end of the 95 % range of kept if open gates are at random steps",
    "kept_null_high": "upper end of the range",
    "overlap": "mean Jaccard overlap of the step's open gates with those of each other step, 0..1",
    "overlap_null": "null: mean overlap of random gates, as many at each step",
    "overlap_null_low": "lower end of the 95 % range of the null",
    "overlap_null_high": "upper end of the range",
    "gates": "the step's gates in order, # open and . closed",
    "n": "number of images for scoring; for the gates of a step, number of fit images",
}
QUICK: dict[str, Any] = {
    "methods": ("gradient", "learned"),
    "fractions": (0.5,),
    "n_fit": 16,
    "epochs": 1,
    "draws": 3,
    "groups": 2,
    "limit": 12,
}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
