"""Trains models by recipes, one or several side by side."""

from __future__ import annotations

from pathlib import Path

from bvit_interp import results
from bvit_interp.cli.options.shared import Machine, RecipeChanges
from bvit_interp.cli.options.training import Training
from bvit_interp.cli.run.processes import processes
from bvit_interp.errors import UserError, choices
from bvit_interp.training.loop import recipe as recipes
from bvit_interp.training.loop import supervised
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.trainer import HISTORY


def run(training: Training, changes: RecipeChanges, machine: Machine) -> None:
    """Train, and print where each checkpoint is."""
    if training.minutes is not None and not training.minutes > 0:
        raise UserError(f"minutes must be > 0, got {training.minutes}")
    if not training.save_minutes >= 0:
        raise UserError(f"save-minutes must be >= 0, got {training.save_minutes}")
    runs = plan(training, changes)
    with processes(machine.device, machine.threads) as device:
        supervised.train_all(
            runs,
            device,
            overwrite=training.overwrite,
            tensorboard=training.tensorboard,
            save_minutes=training.save_minutes,
            minutes=training.minutes,
        )
        if results.rank_and_world()[0] == 0:
            for recipe, out in runs:
                print(_ending(recipe, out))


def plan(training: Training, changes: RecipeChanges) -> list[tuple[Recipe, Path]]:
    """Recipe and folder of every run.

    A single run is written to ``--out`` itself, by default runs/RECIPE; of several runs each has a
    folder RECIPE-seedN below it.
    """
    if not training.recipe:
        shipped = choices(recipes.available(), 40)
        raise UserError(f"--recipe needs at least one; shipped: {shipped}; or a YAML file")
    if training.seeds and any(change.partition("=")[0] == "seed" for change in changes.set):
        raise UserError("--seeds and --set seed=... both give the seed: take one of them")
    seeds = [[f"seed={seed}"] for seed in dict.fromkeys(training.seeds)] or [[]]
    runs = [
        (name, recipes.read(name, [*changes.set, *seed], changes.data))
        for name in dict.fromkeys(training.recipe)
        for seed in seeds
    ]
    if len(runs) == 1:
        ((name, recipe),) = runs
        return [(recipe, training.out or Path("runs") / Path(name).stem)]
    parent = training.out or Path("runs")
    return [(recipe, parent / f"{Path(name).stem}-seed{recipe.seed}") for name, recipe in runs]


def _ending(recipe: Recipe, out: Path) -> str:
    """How a run ended: written, or stopped before its last epoch."""
    path = out / HISTORY
    epochs = len(results.read_table(path)) if path.is_file() else 0
    if epochs == recipe.epochs:
        return f"wrote {out}"
    return f"stopped {out} before its last epoch; the same command goes on"
