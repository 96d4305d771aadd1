"""Options of pruning one block for each of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bvit_interp.errors import UserError, choices

Method = Literal["rtl", "magnitude", "random"]
Ranking = Literal["global", "layer"]
METHODS: tuple[Method, ...] = get_args(Method)
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What is pruned, how often, and by which methods."""

    rounds: int = 4
    """Number of prunings. One more training follows, so that every mask has its accuracy
    (paper: 30)."""
    graft_epochs: int = 1
    """Training epochs of the grafts in each round. One of them costs about as much as five epochs
    of the model (paper: 100)."""
    rate: float = 0.2
    """Share of a step's active weights that each pruning removes, between 0 and 1."""
    ranking: Ranking = "global"
    """How the weights of a step are ranked: over its four matrices together (global), or within
    each matrix (layer)."""
    methods: tuple[Method, ...] = METHODS
    """rtl (a graft for each step), magnitude (one mask for all steps), random (the null)."""

    def __post_init__(self) -> None:
        for name in ("rounds", "graft_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.rate < 1:
            raise UserError(f"rate must be between 0 and 1, got {self.rate}")
        if self.ranking not in RANKINGS:
            raise UserError(f"ranking must be {choices(RANKINGS)}, got {self.ranking!r}")
        repeated = len(set(self.methods)) < len(self.methods)
        if not self.methods or set(self.methods) - {*METHODS} or repeated:
            raise UserError(
                f"methods must be of {choices(METHODS)}, each once,"
                f" got {choices(self.methods) or 'none'}"
            )
