"""What the head after every step costs: one pass of `step-accuracy` against a plain forward, and against a run a step.

    python benchmarks/steps.py [--ckpt checkpoints/bvit-digits-s] [--steps 24] [--batch 64] [--rounds 7]

Every round times each way once, in a new random order; ratios are medians over rounds of paired times.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from bvit_interp import load
from bvit_interp.analyses import step_accuracy
from bvit_interp.models.unroll import unroll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="checkpoints/bvit-digits-s")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = load(options.ckpt)
    views = [unroll(model, steps=t) for t in range(1, options.steps + 1)]
    images = torch.randn(options.batch, 3, *model.patch_embed.img_size)
    labels = torch.randint(model.num_classes, (options.batch,))
    scores, answers = step_accuracy._metrics(views[-1], len(model.blocks))
    ways = {
        f"plain forward of {options.steps} steps": lambda: views[-1](images),
        "step-accuracy: head and scores after every step": lambda: step_accuracy._update(
            scores, answers, step_accuracy._logits(views[-1], images), labels
        ),
        f"{options.steps} separate runs": lambda: [view(images) for view in views],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for name in ways:
            ways[name]()
        for _ in range(options.rounds):
            for name in random.sample(list(ways), len(ways)):
                began = time.perf_counter()
                ways[name]()
                times[name].append(time.perf_counter() - began)
    base, *_ = times.values()
    print(f"{options.ckpt}, batch {options.batch}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    print("| way | ms | time / plain forward |\n|---|---|---|")
    for name, of in times.items():
        ratio = statistics.median(a / b for a, b in zip(of, base, strict=True))
        print(f"| {name} | {1000 * statistics.median(of):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
