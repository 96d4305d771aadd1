"""The word `transfer`: take a checkpoint to another data set by a probe, a time embedding, LoRA or
full tuning."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path

from bvit_interp.cli.analyse import draw
from bvit_interp.cli.options import gathered, parse, processes

_LISTS = ("--mode", "--seeds", "--steps")
_SHOWN = (
    "model",
    "data",
    "backbone",
    "mode",
    "steps",
    "seeds",
    "trainable",
    "accuracy",
    "deviation",
    "chance",
    "exact",
)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Take a checkpoint to another data set: probe, time embedding, LoRA or full tuning, beside
    their nulls."""

    ckpt: str = "checkpoints/bvit-digits-s"
    """Checkpoint, as everywhere; its classes need not be the data's."""
    data: str = "cifar10"
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH. Pets, DTD and Flowers-102
    as folders or parquet; StanfordCars too: torchvision can no longer download it."""
    train_split: str = "train"
    """Split that is trained on."""
    test_split: str | None = None
    """Split that is scored; by default the one to evaluate on."""
    merge: bool = False
    """Write each adapted model as an ordinary checkpoint too; not with --steps on a shared
    block."""
    out: Path = Path("runs/transfer")
    """Folder of transfer.csv, its figure, and of an adapter for every run. It goes on there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads to use; by default all."""
    overwrite: bool = False
    """Start again where a table in the folder would go on."""


def transfer(given: list[str]) -> None:
    """`bvit-interp transfer`."""
    for flag in _LISTS:
        given = gathered(given, flag)
    from bvit_interp import results
    from bvit_interp.data.catalog import open_samples
    from bvit_interp.errors import UserError
    from bvit_interp.models import checkpoint
    from bvit_interp.training.adapting import transfer as transferring
    from bvit_interp.training.adapting import transfer_plot as transfer_figure

    options = make_dataclass(
        "Options", [("inputs", Transfer), ("plan", transferring.Plan)], frozen=True
    )
    parsed = parse(options, "transfer", given, Transfer.__doc__)
    inputs, plan = parsed.inputs, parsed.plan
    with processes(inputs.device, inputs.threads) as device:
        train, test = (
            open_samples(inputs.data, inputs.train_split),
            open_samples(inputs.data, inputs.test_split),
        )
        if [getattr(train, key, None) for key in ("root", "split")] == [
            getattr(test, key, None) for key in ("root", "split")
        ]:
            raise UserError(f"--data {inputs.data}: nothing to score on beside the training images")
        model = checkpoint.load(inputs.ckpt, device)
        results.check_folder(inputs.out)
        name, _, path = inputs.data.partition(":")
        data = Path(path or name).name if name == "folder" or not path else name
        work = transferring.Transfer(
            checkpoint.display_name(inputs.ckpt), model, data, train, test, plan, inputs.out
        )
        frame = transferring.run(work, overwrite=inputs.overwrite, merge=inputs.merge)
        if work.rank == 0:
            table = transferring.summary(frame)
            results.write_table(table, inputs.out / "transfer_summary.csv")
            about = {**plan.options(), "ckpt": inputs.ckpt, "data": inputs.data, "plan": plan}
            results.write_json(
                results.provenance(about), (inputs.out / transferring.TABLE).with_suffix(".json")
            )
            print(table[[*_SHOWN]].to_string(index=False, float_format="{:.3f}".format))
            print(f"\nwrote {inputs.out / transferring.TABLE}")
            draw(transfer_figure, frame, inputs.out / "transfer.png")
