"""Options that all analyses share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is analysed, and where the results go."""

    ckpt: tuple[str, ...] = ("checkpoints/bvit-digits-s",)
    """Checkpoints, one or more: a folder, FOLDER@ema (averaged weights), FOLDER@masked (masks of
    the steps), timm:NAME, timm:NAME@random (seeded random weights) or timm:NAME@FILE."""
    data: str = "digits-s"
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH."""
    split: str | None = None
    """Split of the data set; by default the one to evaluate on."""
    out: Path = Path("figures")
    """Folder for the table (.csv), the figure (.png) and what made them (.json)."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Start again instead of continuing a table in the folder."""
    download: bool = False
    """Download CIFAR with torchvision if it is missing."""
