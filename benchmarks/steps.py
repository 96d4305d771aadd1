"""Time of the head after every step: one pass of `step-accuracy`, and a separate run per step.

    python benchmarks/steps.py [--ckpt checkpoints/bvit-digits-s] [--steps 24] [--batch 64]
        [--rounds 7] [--device cpu] [--out FILE]

Every round times each way once, in a new random order; ratios are medians over rounds of paired
times.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import timing
import torch

from bvit_interp import load
from bvit_interp.analyses.step_accuracy.measure import _StepMetrics
from bvit_interp.models.stepping import answer, states
from bvit_interp.models.unroll import unroll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="checkpoints/bvit-digits-s")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    model = load(options.ckpt, options.device)
    views = [unroll(model, steps=t) for t in range(1, options.steps + 1)]
    images = torch.randn(options.batch, 3, *model.patch_embed.img_size, device=options.device)
    labels = torch.randint(model.num_classes, (options.batch,), device=options.device)
    metrics = _StepMetrics(views[-1], len(model.blocks))

    def every_step() -> None:
        after = itertools.islice(states(views[-1], images), 1, None)
        metrics.update(torch.stack([answer(views[-1], state) for state in after]), labels)

    ways = {
        f"plain forward of {options.steps} steps": lambda: views[-1](images),
        "step-accuracy: head and scores after every step": every_step,
        f"{options.steps} separate runs": lambda: [view(images) for view in views],
    }
    with torch.inference_mode():
        times = timing.paired(ways, options.rounds, options.device)
    base, *_ = times.values()
    lines = [
        f"{options.ckpt}, batch {options.batch}, {timing.machine(options.device)},"
        f" {options.rounds} rounds"
    ]
    lines += ["| way | ms | time / plain forward |", "|---|---|---|"]
    for name, of in times.items():
        lines.append(
            f"| {name} | {1000 * statistics.median(of):.0f} | {timing.ratio(of, base):.2f} |"
        )
    timing.report(lines, options.out)


if __name__ == "__main__":
    main()
