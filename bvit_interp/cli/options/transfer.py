"""Options of `transfer`, beside its plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Target:
    """Adapt a checkpoint to another data set: probe, time embedding, LoRA or full tuning.

    The nulls are in the same table: random weights, adapters at no step, and the share of the most
    frequent class.
    """

    ckpt: str = "checkpoints/bvit-digits-s"
    """Checkpoint of a BViT or a timm ViT: a folder, FOLDER@ema, timm:NAME, timm:NAME@random or
    timm:NAME@FILE. Its classes may differ from those of the data."""
    data: str = "cifar10"
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH. Pets, DTD, Flowers-102 and
    StanfordCars are read from folders or parquet files."""
    train_split: str = "train"
    """Split that is trained on."""
    test_split: str | None = None
    """Split that is scored; by default the one to evaluate on."""
    merge: bool = False
    """Also write each adapted model as an ordinary checkpoint. Not possible with --steps on a
    shared block."""
    out: Path = Path("runs/transfer")
    """Folder for transfer.csv, its figure, and an adapter per run. A transfer that was stopped
    there goes on."""
    overwrite: bool = False
    """Start again instead of continuing a table in the folder."""
