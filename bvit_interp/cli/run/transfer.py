"""Adapts a checkpoint to another data set."""

from __future__ import annotations

from pathlib import Path

from bvit_interp import results
from bvit_interp.cli.options.shared import Machine
from bvit_interp.cli.options.transfer import Target
from bvit_interp.cli.run.channels import check_channels
from bvit_interp.cli.run.output import draw, show
from bvit_interp.cli.run.processes import processes
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.models import checkpoint
from bvit_interp.training.adapting import transfer as transfers
from bvit_interp.training.adapting.transfer_plan import Plan

SHOWN = [
    "model",
    "data",
    "backbone",
    "mode",
    "steps",
    "seeds",
    "trainable_parameters",
    "accuracy",
    "deviation",
    "chance",
    "exact_accuracy",
]


def run(target: Target, plan: Plan, machine: Machine) -> None:
    """Train and score what is missing; print the means over seeds and draw them."""
    with processes(machine.device, machine.threads) as device:
        train = open_samples(target.data, target.train_split)
        test = open_samples(target.data, target.test_split)
        if _origin(train) == _origin(test):
            raise UserError(f"--data {target.data}: nothing to score on beside the training images")
        model = check_channels(checkpoint.load_vit(target.ckpt, device), target.ckpt)
        results.check_folder(target.out)
        transfer = transfers.Transfer(
            checkpoint.display_name(target.ckpt),
            model,
            _data_name(target.data),
            train,
            test,
            plan,
            target.out,
        )
        frame = transfers.run(transfer, overwrite=target.overwrite, merge=target.merge)
        if transfer.rank == 0:
            summary = transfers.summary(frame)
            results.write_table(summary, target.out / "transfer_summary.csv")
            path = target.out / transfers.TABLE
            about = {**plan.options(), "ckpt": target.ckpt, "data": target.data, "plan": plan}
            results.write_json(results.provenance(about), path.with_suffix(".json"))
            show(summary[SHOWN])
            print(f"\nwrote {path}")
            draw("bvit_interp.training.adapting.transfer_plot", frame, target.out / "transfer.png")


def _origin(samples: Samples) -> list[object]:
    """Folder and split of a data set, where it has them."""
    return [getattr(samples, name, None) for name in ("root", "split")]


def _data_name(spec: str) -> str:
    """The data set's name in the table: of NAME:PATH the name, of a folder its own."""
    name, _, path = spec.partition(":")
    return Path(path or name).name if name == "folder" or not path else name
