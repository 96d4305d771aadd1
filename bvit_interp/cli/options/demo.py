"""Options of `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Answer every question on a few images, in minutes, and gather the results in one page.

    Each question runs with the small options that its folder names, so the numbers are rough.
    """

    ckpt: tuple[str, ...] = ("checkpoints/bvit-digits-s",)
    """Checkpoints, as for every question."""
    data: str = "digits-s"
    """Data set with masks: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH."""
    limit: int = 100
    """Number of images, where the question does not name a smaller one."""
    out: Path = Path("runs/demo")
    """Folder of the results."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
