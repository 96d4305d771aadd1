"""Options that all analyses share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is analysed, and where the results go."""

    ckpt: tuple[str, ...] = ("checkpoints/bvit-digits-s",)
    """Checkpoints, one or more: a folder, FOLDER@ema (averaged weights), FOLDER@masked (masks of
    the steps), timm:NAME or torchvision:NAME (with @random: seeded random weights, or @FILE),
    hf:FOLDER, FILE.py:factory or module:package.module.factory (the named code is run). Add
    @loop=PATH to name the block of the loop, @size=N for another image size, @prefix=cls,reg for
    the tokens before the patches, and @grid=14x14 for the rows and columns of patches."""
    data: str = "digits-s"
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH."""
    split: str | None = None
    """Split of the data set; by default the one to evaluate on."""
    out: Path | None = None
    """Folder for the table (.csv), the figure (.png) and what made them (.json); by default
    runs/WORD, with the question's word."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace a table in the folder, also one of other options."""
    download: bool = False
    """Download CIFAR with torchvision if it is missing."""
