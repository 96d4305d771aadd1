"""Options of `train` and `study`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Training:
    """Train a model by a recipe and write a checkpoint folder."""

    recipe: tuple[str, ...]
    """A shipped recipe (cifar10, imagenette-d128, ...; an unknown name lists them) or a YAML file.
    Several are trained side by side on one device."""
    seeds: tuple[int, ...] = ()
    """Random seeds: each recipe is trained with each of them. By default the recipe's own."""
    out: Path | None = None
    """Checkpoint folder; by default runs/RECIPE. For several runs, the folder that holds one folder
    RECIPE-seedN per run; by default runs. A run that was stopped there goes on."""
    overwrite: bool = False
    """Start again instead of continuing a run in the folder."""
    minutes: float | None = None
    """Stop after this many minutes and save a state from which the same command goes on; by default
    train to the end."""
    save_minutes: float = 2.0
    """Minutes between two saved states within an epoch."""
    tensorboard: bool = False
    """Also write a TensorBoard log into the folder."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Train a grid of models (width, steps, heads or blocks); write one table and its figure."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """width, steps, heads, blocks, width-small (two hours on a CPU core), or a .yaml file of your
    own."""
    recipe: str | None = None
    """Recipe of all runs, in place of the study's (cifar10-d128). For instance, digits-s needs no
    data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds: every point is trained with each of them."""
    out: Path | None = None
    """Folder for the table, the figure and a checkpoint per run; by default runs/study-NAME. A
    study that was stopped there goes on."""
    overwrite: bool = False
    """Start again instead of continuing a study in the folder."""
    save_minutes: float = 2.0
    """Minutes between two saved states within an epoch."""
