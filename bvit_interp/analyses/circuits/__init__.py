"""Which heads and neurons does each step need, and would one circuit do for all steps?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

LABELS = {
    "per-step": "circuit of each step",
    "even": "as many at every step, own units",
    "all-steps": "same units at every step",
    "shuffled": "circuit of another step",
    "shuffled-units": "own number, another step's units",
    "random": "null: own number, random units",
    "even-random": "null: as many at every step, random",
    "same-random": "null: same random units at every step",
}


Method = Literal["gradient", "learned"]


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the circuits; `limit` is of the images judged on."""

    fractions: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2)
    """Shares of the gates that stay open, between 0 and 1."""
    methods: tuple[Method, ...] = ("gradient",)
    """How gates are chosen: gradient, learned, or both."""
    groups: int = 32
    """Groups of neighbouring neurons at a step, each with one gate."""
    ablation: Literal["mean", "zero"] = "mean"
    """What a closed unit gives: its mean over the fit images, token by token, or zero."""
    fit_images: int = 128
    """Images that means, gradients and learning are over, kept in memory; of those that `limit`
    leaves out as far as there are, at most half of the set, and not judged on."""
    epochs: int = 4
    """Passes over them in which gates are learned."""
    draws: int = 2
    """Orders of the steps, and random circuits."""
    seed: int = 0
    """Of the fit images, the orders and the random circuits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or not all(0 < fraction < 1 for fraction in self.fractions):
            raise UserError(f"fractions must be between 0 and 1, got {self.fractions}")
        if (
            not self.methods
            or set(self.methods) - set(get_args(Method))
            or len(set(self.methods)) < len(self.methods)
        ):
            allowed = ", ".join(get_args(Method))
            raise UserError(
                f"methods must be one or more of {allowed}, each once, got {', '.join(self.methods)!r}"
            )
        if self.ablation not in ("mean", "zero"):
            raise UserError(f"ablation must be mean or zero, got {self.ablation!r}")
        for name in ("groups", "fit_images", "epochs", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")

    def resume_key(self) -> dict[str, Any]:
        """Without what a sweep may be continued with more of."""
        return {
            key: value
            for key, value in super().resume_key().items()
            if key not in ("fractions", "methods")
        }


COLUMNS = {
    "model": "checkpoint",
    "method": "how gates are chosen: gradient or learned; none for the whole model",
    "fraction": "share of the gates of each kind that stay open, 0..1",
    "condition": "full, per-step, even, all-steps, shuffled, shuffled-units, random, even-random or same-random",
    "kind": "head or neuron: gates of a step; all for the rows of a whole condition",
    "step": "step t whose gates the row is about; all for the rows of a whole condition",
    "kl": "mean KL(whole model || gated model) over images and draws, nats",
    "kl_low": "lower end of its normal 95 % interval over images",
    "kl_high": "upper end of it",
    "kl_least": "the least mean KL of a draw",
    "kl_most": "the largest of a draw",
    "excess": "mean of KL less the per-step circuit's, image by image, nats; none for that",
    "excess_low": "lower end of its normal 95 % interval over images",
    "excess_high": "upper end of it",
    "accuracy": "share of images classified right, mean over draws, 0..1",
    "low": "lower end of its normal 95 % interval over images",
    "high": "upper end of it",
    "agreement": "share of images with the whole model's answer, mean over draws, 0..1",
    "chance": "null: share of the most frequent class among the images, 0..1",
    "kept": "share of the step's gates that are open, 0..1",
    "kept_null_low": "null: lower end of the 95 % range of it if the open gates lay anywhere",
    "kept_null_high": "upper end of it",
    "overlap": "mean Jaccard overlap of the step's open gates with each other step's, 0..1",
    "overlap_null": "null: mean of the same over random gates, as many at each step",
    "overlap_null_low": "lower end of its 95 % range",
    "overlap_null_high": "upper end of it",
    "gates": "the step's gates in order, # open and . closed",
    "n": "images judged on; of a step, images the gates are chosen on",
}


__getattr__, __dir__, __all__ = attach(__name__)
