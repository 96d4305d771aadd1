"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it runs."""

    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """Number of CPU threads; by default all."""


@dataclass(frozen=True, kw_only=True)
class RecipeChanges:
    """Changes of the recipe."""

    data: str | None = None
    """Data set, NAME:PATH, in place of the recipe's. It needs a train split and one to score
    on."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change: key=value ..., and model.key=value for those of the
    model."""
