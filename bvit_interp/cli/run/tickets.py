"""Searches a sparse subnetwork for each subset of the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from bvit_interp.cli.options.shared import Machine, RecipeChanges
from bvit_interp.cli.options.sparsity import TicketSearch
from bvit_interp.cli.run.output import draw, show
from bvit_interp.cli.run.processes import processes
from bvit_interp.errors import UserError
from bvit_interp.training.loop import recipe as recipes
from bvit_interp.training.pruning import by_subset
from bvit_interp.training.pruning.ticket_plan import TicketPlan


def run(search: TicketSearch, plan: TicketPlan, changes: RecipeChanges, machine: Machine) -> None:
    """Search, print a summary and draw the table."""
    recipe = recipes.read(search.recipe, changes.set, changes.data)
    if search.model is not None:
        recipe = replace(recipe, model=_timm_model(search.model, changes.set))
    if search.seed is not None:
        recipe = replace(recipe, seed=search.seed)
    name = Path(search.recipe).stem.removeprefix("tickets-")
    out = search.out or Path("runs") / f"tickets-{name}"
    with processes(machine.device, machine.threads) as device:
        frame = by_subset.run(recipe, plan, out, device, overwrite=search.overwrite)
        show(by_subset.summary(frame))
        print(f"\nwrote {out / by_subset.TABLE}")
        draw("bvit_interp.training.pruning.ticket_plot", frame, out / "tickets.png")


def _timm_model(spec: str, settings: tuple[str, ...]) -> dict[str, object]:
    """A timm model with the arguments that --set gives it, and none of the recipe's."""
    name = spec.removeprefix("timm:")
    if name == spec:
        raise UserError(f"--model takes timm:NAME, got {spec!r}")
    arguments = (
        setting.removeprefix("model.").partition("=")
        for setting in settings
        if setting.startswith("model.")
    )
    return {"name": name} | {key: yaml.safe_load(value) for key, _, value in arguments}
