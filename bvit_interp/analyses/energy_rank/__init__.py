"""How many directions do the FFN's weights and the CLS token use, step by step?"""

from __future__ import annotations

from dataclasses import dataclass

from bvit_interp.analyses import attach
from bvit_interp.data.options import LoaderOptions
from bvit_interp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(LoaderOptions):
    """Options of the energy rank."""

    energy: float = 0.95
    """Share of the squared singular values to hold, 0..1."""
    centred: bool = False
    """Take the mean CLS token off before the rank; weights are never centred."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise UserError(f"energy must be in (0, 1], got {self.energy}")


COLUMNS = {
    "model": "checkpoint",
    "matrix": "fc1 (in-projection), fc2 (out-projection) or cls (CLS token after the step)",
    "step": "step t, from 1; the weights of a bViT are the same at every step",
    "rank": "energy rank: singular values needed",
    "share": "rank / largest possible rank, 0..1",
    "random_rank": "null: energy rank of a random Gaussian matrix of this shape",
    "full_rank": "largest possible rank, min(rows, columns)",
    "rows": "rows of the matrix (for cls, images; one less if centred, for the mean takes one dimension)",
    "columns": "columns of the matrix",
    "energy": "share of the squared singular values held, 0..1",
    "mean_share": "share of the squared entries that is the mean CLS token's, before centring, 0..1; none for weights",
}


__getattr__, __dir__, __all__ = attach(__name__)
