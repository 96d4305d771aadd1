"""Answers every question on a few images."""

from __future__ import annotations

import importlib

from bvit_interp.analyses import ANALYSES
from bvit_interp.cli.options.analysis import Inputs
from bvit_interp.cli.options.demo import Demo
from bvit_interp.cli.run.analysis import run_analysis
from bvit_interp.cli.run.processes import processes
from bvit_interp.report import page


def run(demo: Demo) -> None:
    """Run the questions in turn, and write the page of their results."""
    with processes(demo.device) as device:
        for word in ANALYSES:
            question = importlib.import_module(f"bvit_interp.analyses.{word}")
            print(f"\n{(question.__doc__ or '').splitlines()[0]}")
            inputs = Inputs(
                ckpt=getattr(question, "DEMO_CKPT", demo.ckpt),
                data=demo.data,
                out=demo.out,
                overwrite=True,
            )
            config = question.Config(**{"limit": demo.limit, **question.QUICK})
            run_analysis(word, inputs, config, device)
    print(f"\nwrote {page.write(demo.out, None)}")
