"""Trains a grid of models; writes one table and its figure."""

from __future__ import annotations

from pathlib import Path

from bvit_interp import results
from bvit_interp.cli.options.shared import Machine, RecipeChanges
from bvit_interp.cli.options.training import Study
from bvit_interp.cli.run.output import draw, show
from bvit_interp.cli.run.processes import processes
from bvit_interp.training.loop import study as studies


def run(study: Study, changes: RecipeChanges, machine: Machine) -> None:
    """Train what is missing, print the table and draw it."""
    plan = studies.read(study.name, study.recipe, changes.set, changes.data)
    out = study.out or Path("runs") / f"study-{Path(study.name).stem}"
    with processes(machine.device, machine.threads) as device:
        frame = studies.run(
            plan,
            study.seeds,
            out,
            device,
            overwrite=study.overwrite,
            save_minutes=study.save_minutes,
        )
        if results.rank_and_world()[0] == 0:
            show(frame)
            draw("bvit_interp.training.loop.study_plot", frame, out / f"study_{plan.name}.png")
