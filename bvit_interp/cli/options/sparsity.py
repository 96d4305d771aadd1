"""Options of `prune` and `tickets`, beside their plans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Prune a bViT with a mask for each step, and compare with one mask and with random masks."""

    recipe: str
    """cifar10-pathways (the paper's model), cifar10-d128-pathways, digits-s-pathways (minutes), or
    a YAML file."""
    epochs: int | None = None
    """Epochs of the training in each round; by default the recipe's (paper: 200)."""
    out: Path | None = None
    """Folder for rounds.csv and METHOD/round-NN; by default runs/prune-RECIPE. A pruning that was
    stopped there goes on."""
    overwrite: bool = False
    """Start again instead of continuing a pruning in the folder."""
    save_minutes: float = 2.0
    """Minutes between two saved states within an epoch."""


@dataclass(frozen=True, kw_only=True)
class TicketSearch:
    """Find a sparse subnetwork for each class, cluster or environment, and train them as one model.

    All subnetworks share one dense tensor of weights and differ in their masks.
    """

    recipe: str
    """tickets-digits-s (minutes), another recipe or a YAML file. It gives the model, the data and
    the optimiser; Mixup must be off."""
    model: str | None = None
    """timm:NAME in place of the recipe's model, with --set model.key=value. Linear layers and
    convolutions are masked; norms, biases and the classifier are not."""
    seed: int | None = None
    """Random seed for weights, draws and clusters; by default the recipe's."""
    out: Path | None = None
    """Folder for tickets.csv, its figure, masks and weights; by default runs/tickets-RECIPE. A
    search that was stopped there goes on."""
    overwrite: bool = False
    """Start again instead of continuing a search in the folder."""
