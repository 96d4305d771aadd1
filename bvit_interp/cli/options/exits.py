"""Options of `early-exit train`, beside the plan of the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ExitTraining:
    """Train classifiers at chosen steps of a frozen model.

    The CLS states of the training images are computed once and kept until the classifiers are
    written.
    """

    ckpt: str = "checkpoints/bvit-digits-s"
    """Checkpoint of a BViT or a timm ViT: a folder, FOLDER@ema, timm:NAME, timm:NAME@random or
    timm:NAME@FILE."""
    data: str = "digits-s"
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH."""
    split: str = "train"
    """Split that is trained on."""
    out: Path = Path("runs/exits")
    """Folder for `exits.safetensors` and its history."""
    overwrite: bool = False
    """Replace exits in the folder."""
