"""How many directions do the FFN's weights and the CLS token use, step by step?

The energy rank of a matrix is the least number of singular values that hold 95 % of its energy. It
is measured for both FFN weights and for the CLS tokens after each step. The null is the energy rank
of a random matrix of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of `energy-rank`."""

    energy: float = 0.95
    """Share of the squared singular values to hold, 0..1."""
    centred: bool = False
    """Subtract the mean CLS token before the decomposition; weights are never centred."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise UserError(f"energy must be in (0, 1], got {self.energy}")


COLUMNS = {
    "model": "checkpoint",
    "matrix": "fc1 (in-projection), fc2 (out-projection) or cls (CLS tokens after the step)",
    "step": "step t, from 1; the weights of a bViT are the same at every step",
    "rank": "energy rank: number of singular values needed",
    "share": "rank / largest possible rank, 0..1",
    "random_rank": "null: expected energy rank of a Gaussian random matrix of the same shape",
    "full_rank": "largest possible rank, min(rows, columns)",
    "rows": "rows of the matrix; for cls the number of images, minus 1 if the tokens are centred",
    "columns": "columns of the matrix",
    "energy": "share of the squared singular values held, 0..1",
    "mean_share": "share of the tokens' squared norm that lies in their mean, before centring,"
    " 0..1; empty for weights",
}
QUICK: dict[str, Any] = {}
"""Options with which the answer takes seconds on the embedded data."""

__getattr__, __dir__, __all__ = attach(__name__)
