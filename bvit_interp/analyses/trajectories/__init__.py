"""How does the CLS token move, and when do classes separate?

The CLS token of every image after every step is embedded in two dimensions, by PaCMAP and by PCA.
An embedding can invent structure, so each point carries checks of its nearest neighbours: how many
are kept from CLS space, how many are at most one step away, and how many of those at the same step
are of the same class. The last two are also given in CLS space. The null of each check is what
chance gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError

Method = Literal["pacmap", "pca"]
METHODS: tuple[Method, ...] = ("pacmap", "pca")


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `trajectories`."""

    steps: int | None = None
    """Steps to follow, at least 1; by default those the model was made for. A stacked ViT stops at
    its last block."""
    methods: tuple[Method, ...] = METHODS
    """Embeddings: pacmap (the paper's), pca."""
    neighbours: int = 10
    """Number of nearest neighbours k in the checks."""
    seed: int = 0
    """Random seed for the embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")
        unknown = set(self.methods) - set(METHODS)
        if not self.methods or unknown or len(set(self.methods)) < len(self.methods):
            raise UserError(
                f"methods must be one or more of {', '.join(METHODS)}, got {self.methods}"
            )
        if self.neighbours < 1:
            raise UserError(f"neighbours must be >= 1, got {self.neighbours}")
        if not 0 <= self.seed < 2**31 - 1:
            raise UserError(f"seed must be 0..{2**31 - 2}, got {self.seed}")


COLUMNS = {
    "model": "checkpoint",
    "method": "embedding: pacmap or pca",
    "step": "step t, from 1",
    "image": "name of the image",
    "label": "class of the image",
    "x": "first coordinate, in the embedding's units",
    "y": "second coordinate",
    "neighbours_kept": (
        "share of the k nearest neighbours in CLS space that are among the k nearest in 2-D, 0..1"
    ),
    "neighbours_kept_null": "null: chance, k / (n - 1) of n points",
    "adjacent_step_share": (
        "share of the k nearest neighbours in 2-D among other images' points that are at most "
        "one step away, 0..1"
    ),
    "adjacent_step_share_cls": "the same share in CLS space",
    "adjacent_step_share_null": (
        "null: its mean with the steps of every other image permuted, 3 / T (2 / T at the first "
        "and the last step)"
    ),
    "same_step_class_share": (
        "share of the k nearest neighbours in 2-D among other images' points of the same step that "
        "are of the same class, 0..1"
    ),
    "same_step_class_share_cls": "the same share in CLS space",
    "same_step_class_share_null": "null: its mean with the labels permuted over the other images",
    "neighbours": "number of neighbours k",
    "n": "number of images",
}
QUICK: dict[str, Any] = {"methods": ("pca",)}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
