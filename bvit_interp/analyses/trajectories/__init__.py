"""Which way does the CLS token go from step to step, and do its images part by class or by step?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

METHODS = ("pacmap", "pca")


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the trajectories."""

    steps: int | None = None
    """Steps to follow, from 1; by default those the model was made for. A stacked ViT stops at its
    last block."""
    methods: tuple[Literal["pacmap", "pca"], ...] = METHODS  # type: ignore[assignment]
    """Embeddings: pacmap (the paper's), pca."""
    neighbours: int = 10
    """Neighbours k in the checks."""
    seed: int = 0
    """Of the embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")
        if (
            not self.methods
            or set(self.methods) - set(METHODS)
            or len(set(self.methods)) < len(self.methods)
        ):
            raise UserError(
                f"methods must be one or more of {', '.join(METHODS)}, got {self.methods}"
            )
        if self.neighbours < 1:
            raise UserError(f"neighbours must be >= 1, got {self.neighbours}")
        if not 0 <= self.seed < 2**31 - 1:
            raise UserError(f"seed must be 0..{2**31 - 2}, got {self.seed}")


COLUMNS = {
    "model": "checkpoint",
    "method": "pacmap or pca",
    "step": "step t, from 1",
    "image": "name of the image",
    "label": "its class",
    "x": "first coordinate, in the embedding's units",
    "y": "second coordinate",
    "kept": "share of the k nearest neighbours in CLS space that are among the k nearest in 2-D, 0..1",
    "kept_null": "null: chance, k / (n - 1) of n points",
    "staged": "share of the k nearest neighbours in 2-D among other images' points that are within one step, 0..1",
    "staged_cls": "the same in CLS space",
    "staged_null": "null: its mean with the steps of every other image permuted, 3 / T (2 / T at both ends)",
    "same_class": "share of the k nearest neighbours in 2-D among other images' points of the own class, 0..1",
    "same_class_cls": "the same in CLS space",
    "same_class_null": "null: its mean with the labels permuted over the other images",
    "neighbours": "k",
    "n": "images",
}


__getattr__, __dir__, __all__ = attach(__name__)
