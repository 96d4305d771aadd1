"""Options of `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Report:
    """Gather the tables and figures of a folder into one HTML page that opens from disk."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Folder of results, of one folder WORD per question or of all."""
    out: Path | None = None
    """The page; by default report.html in that folder."""
