"""Options of `data list` and `data export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Listing:
    """List the data sets and where each is looked for."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a data set with masks as files, in the layout of ImageNet-S."""

    samples: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write, new or empty."""
    split: str | None = None
    """Split of the data set; by default the one to evaluate on."""
    limit: int | None = None
    """Number of images to write, evenly spaced over the data set; by default all."""
