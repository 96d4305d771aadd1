"""What a command prints and draws."""

from __future__ import annotations

import importlib
from pathlib import Path

import pandas as pd

from bvit_interp.errors import MissingExtra


def show(frame: pd.DataFrame) -> None:
    """Print a summary, without the column `path`."""
    shown = frame.drop(columns="path", errors="ignore")
    print(shown.to_string(index=False, float_format="{:.3f}".format))


def draw(module: str, frame: pd.DataFrame, path: Path) -> None:
    """Write the figure that the `plot` of a module makes of a table.

    Raises
    ------
    MissingExtra
        If matplotlib, which is optional, is not installed.
    """
    try:
        plotting = importlib.import_module("bvit_interp.plotting")
        plot = importlib.import_module(module).plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise MissingExtra("matplotlib", "viz") from None
    plotting.save(plot(frame), path)
    print(f"wrote {path}")
