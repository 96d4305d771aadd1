"""What feature pictures cost: one batched optimisation against lucent's `render_vis`, picture by picture.

    python benchmarks/features.py [--ckpt checkpoints/bvit-digits-s] [--neurons 3] [--iterations 3] [--rounds 3]

Both make a picture of every (neuron, step) pair with the same iterations, optimiser settings, augmented copies, total
variation, image size and unroll, one thread, weights asking for gradients as a loaded model's do. lucent is called
once a pair, as its interface has it, on a fresh unroll each time (its hooks are never removed). What is timed is the
optimisation alone, in CPU seconds of one thread, so that other processes count little. Rounds alternate in random
order; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import statistics
import time
import warnings
from pathlib import Path

import torch

from bvit_interp import load
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.maximise import VARIATION, Neurons, Recipe, Stream, maximise, total_variation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # hard-coded in lucent


def pairs_of(model, count):
    """Every step of `count` neurons."""
    steps = len(model.blocks)
    neurons = torch.linspace(0, model.blocks[0].mlp.fc1.out_features - 1, count).long()
    return neurons.repeat_interleave(steps), torch.arange(1, steps + 1).repeat(count)


def time_ours(model, neurons, steps, recipe):
    """CPU seconds for all pairs in one call."""
    of = Neurons(model, MEAN, STD)
    began = time.process_time()
    maximise(of, neurons, steps, recipe)
    return time.process_time() - began


def time_lucent(model, neurons, steps, recipe):
    """CPU seconds of one `render_vis` a pair."""
    from lucent.optvis import render

    seconds, size = 0.0, tuple(model.patch_embed.img_size)
    variation = VARIATION * recipe.tv * 224 / size[0]
    for neuron, step in zip(neurons.tolist(), steps.tolist(), strict=True):
        view = unroll(model)
        image = torch.rand(1, 3, *size).requires_grad_()
        stream, seen = Stream(recipe, size), []

        def augment(pixels, stream=stream, seen=seen):
            seen.append(stream.draw(len(seen))(pixels)[0])
            return seen[-1]

        def loss(read, neuron=neuron, step=step, view=view, seen=seen):
            fired = read(f"blocks_{step - 1}_mlp_act")[:, view.num_prefix_tokens :, neuron].mean()
            return variation * total_variation(seen[-1]).mean() - recipe.weight * fired

        began = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            render.render_vis(
                view, loss, param_f=lambda image=image: ([image], lambda: image),
                optimizer=lambda parameters: torch.optim.Adam(parameters, lr=recipe.lr, betas=(0.5, 0.99)),
                transforms=[augment], thresholds=(recipe.iterations,), progress=False, show_image=False,
                fixed_image_size=size[0],
            )  # fmt: skip
        seconds += time.process_time() - began
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="checkpoints/bvit-digits-s")
    parser.add_argument("--neurons", type=int, default=3, help="neurons, each at every step")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # lucent's own
    model = load(options.ckpt)
    neurons, steps = pairs_of(model, options.neurons)
    recipe = Recipe(iterations=options.iterations)
    ways = {"ours, all in one call": time_ours, "lucent render_vis, one call each": time_lucent}
    seconds = {name: [] for name in ways}
    for way in ways.values():  # warm up
        way(model, neurons[-1:], steps[-1:], Recipe(iterations=1))
    for _ in range(options.rounds):
        for name in random.sample(list(ways), len(ways)):
            seconds[name].append(ways[name](model, neurons, steps, recipe))
    ours, lucent = seconds.values()
    ratios = [theirs / own for own, theirs in zip(ours, lucent, strict=True)]
    each = 1e3 / len(neurons) / options.iterations
    lines = [
        f"{len(neurons)} pictures, {options.iterations} iterations of {recipe.copies} copies, one thread", "",
        "| way | ms a picture and iteration |", "|---|---|",
        *(f"| {name} | {statistics.median(times) * each:.1f} |" for name, times in seconds.items()), "",
        f"lucent / ours: {statistics.median(ratios):.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})",
    ]  # fmt: skip
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
