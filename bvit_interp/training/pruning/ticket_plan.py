"""Options of a search for subnetworks of subsets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from bvit_interp.errors import UserError, choices

By = Literal["class", "class-step", "cluster", "column"]
Clustering = Literal["kmeans", "hdbscan"]
Method = Literal["rtl", "imp", "multi", "random"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class TicketPlan:
    """Which subsets of the data get a subnetwork, how sparse it is, and the methods."""

    by: By = "class"
    """Subsets: class (one-vs-rest), class-step (a mask for each class and step of a
    bViT), cluster (see --features) or column (see --column)."""
    column: str | None = None
    """FILE.csv:COLUMN, for --by column. The file has the columns split, index and COLUMN, and a row
    for each image."""
    features: str | None = None
    """Checkpoint whose CLS token after the last step is clustered, for --by cluster."""
    algorithm: Clustering = "kmeans"
    """Clustering algorithm."""
    clusters: int = 4
    """Number of clusters; for hdbscan, roughly the largest number."""
    classes: tuple[str, ...] = ()
    """Names of the classes to use; by default all."""
    sparsity: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the masked weights to prune. At each of them the subnetworks are retrained and
    scored; 0 trains the dense networks."""
    rate: float = 0.5
    """Largest share of the remaining weights that one round prunes."""
    iterations: int = 60
    """Training steps of a subset before each pruning (T of Algorithm 1; the paper trains 10
    epochs)."""
    rewind: int = 0
    """Steps of ordinary training on all classes before the first weights are taken (Frankle et al.
    2020, arXiv 1912.05671). The paper takes untrained weights."""
    retrain_epochs: int = 3
    """Epochs of the retraining, over the largest subset (Algorithm 2; paper: 10)."""
    methods: tuple[Method, ...] = METHODS
    """rtl (a mask for each subset), imp (one mask, one model), multi (a model for each subset) and
    random (rtl with random masks, the null)."""
    tolerance: float = 0.05
    """Rise of the mean overlap of the masks that counts as a collapse."""
    limit: int | None = None
    """Number of test images to score, evenly spaced over the test set; by default all."""

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise UserError(f"by must be one of {choices(get_args(By))}, got {self.by!r}")
        if (self.by == "column") != (self.column is not None):
            raise UserError("--column FILE.csv:COLUMN is given with --by column, and only there")
        if (self.by == "cluster") != (self.features is not None):
            raise UserError("--features CKPT is given with --by cluster, and only there")
        if self.algorithm not in get_args(Clustering):
            raise UserError(f"algorithm must be kmeans or hdbscan, got {self.algorithm!r}")
        if not self.sparsity or any(not 0 <= share < 1 for share in self.sparsity):
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
        repeated = len(set(self.methods)) < len(self.methods)
        if not self.methods or set(self.methods) - {*METHODS} or repeated:
            raise UserError(
                f"methods must be of {choices(METHODS)}, each once,"
                f" got {choices(self.methods) or 'none'}"
            )

    def resume_key(self) -> dict[str, Any]:
        """The options that every row depends on; methods may be added later."""
        return {k: v for k, v in asdict(self).items() if k not in ("methods", "tolerance")}


def schedule(targets: Sequence[float], rate: float) -> list[tuple[float, bool]]:
    """Sparsity after each round, and whether it is a target.

    The density falls in equal ratios from one target to the next.
    """
    rounds: list[tuple[float, bool]] = [(0.0, True)] if 0 in targets else []
    density = 1.0
    for target in sorted({*targets} - {0}):
        ratio = (1 - target) / density
        count = max(math.ceil(math.log(ratio) / math.log(1 - rate) - 1e-9), 1)
        rounds += [(1 - density * ratio ** (i / count), False) for i in range(1, count)]
        rounds.append((target, True))
        density = 1 - target
    return rounds
