"""Trains early exits of a frozen model."""

from __future__ import annotations

from bvit_interp import results
from bvit_interp.cli.options.exits import ExitTraining
from bvit_interp.cli.options.shared import Machine
from bvit_interp.cli.run.channels import check_channels
from bvit_interp.cli.run.processes import processes
from bvit_interp.data.catalog import open_samples
from bvit_interp.models import checkpoint
from bvit_interp.training.adapting import exits
from bvit_interp.training.adapting.exit_plan import Plan


def run(training: ExitTraining, plan: Plan, machine: Machine) -> None:
    """Train the exits and write them."""
    with processes(machine.device, machine.threads) as device:
        data = open_samples(training.data, training.split)
        model = check_channels(checkpoint.load_vit(training.ckpt, device), training.ckpt)
        results.check_folder(training.out)
        exits.train(model, data, plan, training.out, training.overwrite)
        if results.rank_and_world()[0] == 0:
            print(f"wrote {training.out}")
