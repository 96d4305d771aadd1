"""The word `early-exit`: train exits for a frozen model, or evaluate them (an analysis as any
other)."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path

from bvit_interp.cli import analyse
from bvit_interp.cli.options import gathered, parse, processes


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train classifiers at chosen steps of a frozen model, on CLS states that it computes once."""

    ckpt: str = "checkpoints/bvit-digits-s"
    """Checkpoint, as everywhere."""
    data: str = "digits-s"
    """Data set: a NAME of `bvit-interp data list`, NAME:PATH, or a PATH."""
    split: str = "train"
    """Its split."""
    out: Path = Path("runs/exits")
    """Folder for `exits.safetensors` and their history."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace exits that are there."""


def early_exit(given: list[str]) -> None:
    """`bvit-interp early-exit [train | evaluate] ...`; evaluate may be left out."""
    if given[:1] == ["train"]:
        _train(given[1:])
    else:
        analyse.analyse("early_exit", gathered(given[given[:1] == ["evaluate"] :], "--exits"))


def _train(given: list[str]) -> None:
    from bvit_interp import results
    from bvit_interp.data.catalog import open_samples
    from bvit_interp.models import checkpoint
    from bvit_interp.training.adapting import exits as exiting

    options = make_dataclass("Options", [("inputs", Train), ("plan", exiting.Plan)], frozen=True)
    parsed = parse(options, "early-exit train", gathered(given, "--exits"), Train.__doc__)
    inputs = parsed.inputs
    with processes(inputs.device) as device:
        data, model = open_samples(inputs.data, inputs.split), checkpoint.load(inputs.ckpt, device)
        results.check_folder(inputs.out)
        exiting.train(model, data, parsed.plan, inputs.out, inputs.overwrite)
        if results.rank_and_world()[0] == 0:
            print(f"wrote {inputs.out}")
