"""Prunes a bViT with a mask for each step."""

from __future__ import annotations

from pathlib import Path

from bvit_interp import results
from bvit_interp.cli.options.shared import Machine, RecipeChanges
from bvit_interp.cli.options.sparsity import Pruning
from bvit_interp.cli.run.output import show
from bvit_interp.cli.run.processes import processes
from bvit_interp.training.loop import recipe as recipes
from bvit_interp.training.pruning import by_step
from bvit_interp.training.pruning.step_plan import StepPlan


def run(pruning: Pruning, plan: StepPlan, changes: RecipeChanges, machine: Machine) -> None:
    """Prune, and print the table of rounds."""
    epochs = () if pruning.epochs is None else (f"epochs={pruning.epochs}",)
    recipe = recipes.read(pruning.recipe, (*changes.set, *epochs), changes.data)
    out = pruning.out or Path("runs") / f"prune-{Path(pruning.recipe).stem}"
    with processes(machine.device, machine.threads) as device:
        frame = by_step.run(
            recipe,
            plan,
            out,
            device,
            overwrite=pruning.overwrite,
            save_minutes=pruning.save_minutes,
        )
        if results.rank_and_world()[0] == 0:
            show(frame)
            print(f"\nwrote {out / by_step.TABLE}")
