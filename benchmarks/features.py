"""Time of feature pictures: one batched optimisation, and lucent's `render_vis` one by one.

    python benchmarks/features.py [--ckpt checkpoints/bvit-digits-s] [--neurons 3]
        [--iterations 3] [--rounds 3]
    python benchmarks/features.py --device cuda        4 neurons, 8 iterations

Both make a picture of every (neuron, step) pair with the same iterations, optimiser settings,
augmented copies, total variation, image size and unroll. The weights require gradients, like those
of a loaded model. lucent is called once per pair, on a new unroll each time, because it never
removes its hooks. Only the optimisation is timed. On a CPU the time is that of one thread, so that
other processes matter little. Every round times each way once, in random order; the ratio is the
median over rounds. Without lucent only our time is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import random
import statistics
import time
import warnings
from pathlib import Path

import timing
import torch

from bvit_interp import load
from bvit_interp.analyses.features.augmentations import AugmentationSequence
from bvit_interp.analyses.features.maximise import TV_UNIT, maximise, total_variation
from bvit_interp.analyses.features.neurons import NeuronActivations
from bvit_interp.analyses.features.recipe import Recipe
from bvit_interp.models.unroll import unroll

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # hard-coded in lucent


def pairs_of(model, count):
    """Every step of `count` neurons."""
    steps = len(model.blocks)
    neurons = torch.linspace(0, model.blocks[0].mlp.fc1.out_features - 1, count).long()
    return neurons.repeat_interleave(steps), torch.arange(1, steps + 1).repeat(count)


def time_ours(model, neurons, steps, recipe):
    """Seconds for all pairs in one call."""
    activations = NeuronActivations(model, MEAN, STD)
    with stopwatch(model) as passed:
        maximise(activations, neurons, steps, recipe)
    return passed[0]


@contextlib.contextmanager
def stopwatch(model):
    """A list that gets the seconds of the body: CPU time on a CPU, wall time on a GPU."""
    device = str(next(model.parameters()).device)
    clock = time.perf_counter if timing.is_cuda(device) else time.process_time
    timing.wait(device)
    passed, began = [], clock()
    yield passed
    timing.wait(device)
    passed.append(clock() - began)


def time_lucent(model, neurons, steps, recipe):
    """Seconds of one `render_vis` per pair."""
    from lucent.optvis import render

    seconds, size = 0.0, tuple(model.patch_embed.img_size)
    variation = TV_UNIT * recipe.tv_weight * 224 / size[0]
    for neuron, step in zip(neurons.tolist(), steps.tolist(), strict=True):
        view = unroll(model)
        image = torch.rand(1, 3, *size, device=next(model.parameters()).device).requires_grad_()
        sequence, seen = AugmentationSequence(recipe, size), []

        def augment(pixels, sequence=sequence, seen=seen):
            seen.append(sequence.draw(len(seen))(pixels)[0])
            return seen[-1]

        def loss(read, neuron=neuron, step=step, view=view, seen=seen):
            fired = read(f"blocks_{step - 1}_mlp_act")[:, view.num_prefix_tokens :, neuron].mean()
            return variation * total_variation(seen[-1]).mean() - recipe.activation_weight * fired

        with contextlib.redirect_stdout(io.StringIO()), stopwatch(model) as passed:
            render.render_vis(
                view,
                loss,
                param_f=lambda image=image: ([image], lambda: image),
                optimizer=lambda parameters: torch.optim.Adam(
                    parameters, lr=recipe.lr, betas=(0.5, 0.99)
                ),
                transforms=[augment],
                thresholds=(recipe.iterations,),
                progress=False,
                show_image=False,
                fixed_image_size=size[0],
            )
        seconds += passed[0]
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", default="checkpoints/bvit-digits-s")
    parser.add_argument("--neurons", type=int, help="neurons, each at every step (3; on a GPU 4)")
    parser.add_argument("--iterations", type=int, help="iterations per picture (3; on a GPU 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    on_gpu = timing.is_cuda(options.device)
    if not on_gpu:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # from lucent
    model = load(options.ckpt, options.device)
    neurons, steps = pairs_of(model, options.neurons or (4 if on_gpu else 3))
    recipe = Recipe(iterations=options.iterations or (8 if on_gpu else 3))
    ways = {"ours, all in one call": time_ours}
    with contextlib.suppress(ImportError):
        importlib.import_module("lucent.optvis.render")
        ways["lucent render_vis, one call each"] = time_lucent
    seconds = {name: [] for name in ways}
    time_ours(model, neurons, steps, Recipe(iterations=1))  # warm up, at full size
    for way in ways.values():
        way(model, neurons[-1:], steps[-1:], Recipe(iterations=1))
    for _ in range(options.rounds):
        for name in random.sample(list(ways), len(ways)):
            seconds[name].append(ways[name](model, neurons, steps, recipe))
    each = 1e3 / len(neurons) / recipe.iterations
    lines = [
        f"{timing.machine(options.device)}; {len(neurons)} pictures, {recipe.iterations}"
        f" iterations of {recipe.n_copies} "
        f"copies, median of {options.rounds} rounds",
        "",
        "| way | ms per picture and iteration |",
        "|---|---|",
        *(f"| {name} | {statistics.median(times) * each:.3g} |" for name, times in seconds.items()),
        "",
    ]
    if len(ways) > 1:
        ours, lucent = seconds.values()
        ratios = [theirs / own for own, theirs in zip(ours, lucent, strict=True)]
        rounds = ", ".join(f"{r:.2f}" for r in ratios)
        lines.append(f"lucent / ours: {statistics.median(ratios):.2f} (rounds: {rounds})")
    else:
        lines.append("lucent cannot be imported: no ratio")
    timing.report(lines, options.out)


if __name__ == "__main__":
    main()
