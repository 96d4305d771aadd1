"""Answers every question on a few images."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path

from bvit_interp.analyses import ANALYSES
from bvit_interp.cli.options.analysis import Inputs
from bvit_interp.cli.options.demo import Demo
from bvit_interp.cli.run.analysis import run_analysis
from bvit_interp.cli.run.processes import processes
from bvit_interp.data.catalog import open_samples
from bvit_interp.models import checkpoint
from bvit_interp.report import page
from bvit_interp.training.adapting import exits
from bvit_interp.training.adapting.exit_plan import Plan

TRAINED_ON = "digits-s"  # the exits of the demo, on this many of its training images
EXIT_IMAGES = 1000


def run(demo: Demo) -> None:
    """Run the questions in turn, and write the page of their results."""
    with processes(demo.device) as device:
        for word in ANALYSES:
            question = importlib.import_module(f"bvit_interp.analyses.{word}")
            print(f"\n{(question.__doc__ or '').splitlines()[0]}")
            options = {"limit": demo.limit, **question.QUICK}
            if "exits" in {field.name for field in fields(question.Config)}:
                options["exits"] = _exits(demo, device)
            inputs = Inputs(
                ckpt=getattr(question, "DEMO_CKPT", demo.ckpt),
                data=demo.data,
                out=demo.out,
                overwrite=True,
            )
            run_analysis(word, inputs, question.Config(**options), device)
    print(f"\nwrote {page.write(demo.out, None)}")


def _exits(demo: Demo, device: str) -> tuple[Path, ...]:
    """A folder of early exits per checkpoint, trained on a few images."""
    folders = []
    for i, spec in enumerate(demo.ckpt):
        folder = demo.out / "exits" / str(i)
        model, data = checkpoint.load_vit(spec, device), open_samples(TRAINED_ON, "train")
        exits.train(model, data, Plan(limit=EXIT_IMAGES), folder, overwrite=True)
        folders.append(folder)
    return tuple(folders)
