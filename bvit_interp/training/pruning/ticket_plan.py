"""A search for tickets: of which parts of the data, how sparse, and in how many rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bvit_interp.errors import UserError, choices

METHODS = ("rtl", "imp", "multi", "random")
BY = ("class", "class-step", "cluster", "column")


@dataclass(frozen=True, kw_only=True)
class Tickets:
    """What is pruned, how far and beside what. The paper: 10 epochs a round and 10 of
    retraining."""

    by: str = "class"
    """class, class-step (a mask a class and step of a bViT), cluster or column."""
    column: str | None = None
    """FILE.csv:COLUMN, for by column."""
    features: str | None = None
    """Checkpoint whose CLS is clustered, for by cluster."""
    algorithm: str = "kmeans"
    """kmeans or hdbscan."""
    clusters: int = 4
    """How many; of HDBSCAN, roughly the most."""
    classes: tuple[str, ...] = ()
    """Classes that take part; by default all."""
    sparsity: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the masked weights to prune, each retrained and scored."""
    rate: float = 0.5
    """Largest share of the remaining weights that a round prunes."""
    iterations: int = 60
    """Steps of a subset's training before a pruning, T of Algorithm 1."""
    rewind: int = 0
    """Steps of ordinary training on all classes before the first weights are taken (Frankle et al.
    2020, arXiv 1912.05671); the paper takes them untrained."""
    retrain_epochs: int = 3
    """Passes of retraining over the largest subset."""
    methods: tuple[str, ...] = METHODS
    """rtl, and the baselines imp, multi and random."""
    tolerance: float = 0.05
    """Rise of the masks' mean overlap that is called a collapse."""
    limit: int | None = None
    """Score on this many test images, spread over them; by default all."""

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise UserError(f"by must be one of {choices(BY)}, got {self.by!r}")
        if (self.by == "column") != (self.column is not None):
            raise UserError("FILE.csv:COLUMN is given with by column, and only there")
        if (self.by == "cluster") != (self.features is not None):
            raise UserError("--features CKPT is given with --by cluster, and only there")
        if self.algorithm not in ("kmeans", "hdbscan"):
            raise UserError(f"algorithm must be kmeans or hdbscan, got {self.algorithm!r}")
        if not self.sparsity or any(not 0 <= s < 1 for s in self.sparsity):
            raise UserError(
                f"sparsity must be in 0..1, below 1, got {choices(self.sparsity) or 'none'}"
            )
        if not 0 < self.rate < 1:
            raise UserError(f"rate must be between 0 and 1, got {self.rate}")
        for name in ("iterations", "retrain_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")
        if self.rewind < 0:
            raise UserError(f"rewind must be >= 0, got {self.rewind}")
        if (
            not self.methods
            or set(self.methods) - {*METHODS}
            or len(set(self.methods)) < len(self.methods)
        ):
            raise UserError(
                f"methods must be of {choices(METHODS)}, each once, got {choices(self.methods) or 'none'}"
            )

    def resume_key(self) -> dict[str, Any]:
        """What every row depends on; methods may be added later."""
        return {k: v for k, v in asdict(self).items() if k not in ("methods", "tolerance")}


def schedule(targets: Sequence[float], rate: float) -> list[tuple[float, bool]]:
    """Sparsity after each round, and whether it is a target; equal ratios lead from one target to
    the next."""
    rounds, density = [(0.0, True)] if 0 in targets else [], 1.0
    for target in sorted({*targets} - {0}):
        ratio = (1 - target) / density
        count = max(math.ceil(math.log(ratio) / math.log(1 - rate) - 1e-9), 1)
        rounds += [(1 - density * ratio ** (i / count), False) for i in range(1, count)] + [
            (target, True)
        ]
        density = 1 - target
    return rounds
