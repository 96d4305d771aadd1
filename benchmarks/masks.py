"""Time of masks per step: evaluation, a training step with masks, a step of all twelve grafts.

    python benchmarks/masks.py [--widths 128 256] [--batch 128] [--rounds 9]
        [--device cpu] [--out FILE]

Evaluation multiplies by the masks once and then uses twelve matrices where the plain model uses one
(float32). Training multiplies in every forward pass (bf16, as in the trainer: forward, loss,
backward, AdamW). On a CPU the time is that of the process, so that other processes matter less.
Every round times each way once, in a new random order; ratios are medians over rounds of paired
times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timing
import timm
import torch
import torch.nn.functional as F
from torch import nn

import bvit_interp.models.bvit  # noqa: F401  (registers the models with timm)
from bvit_interp.models.masks import Masks, full, masked
from bvit_interp.training.loop import build
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning.grafts import Grafts, graft_logits

TOKENS = {"img_size": 32, "patch_size": 4, "num_heads": 4, "num_classes": 10}
NAME = "bvit_small_patch16_224"


def evaluation(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """A forward pass in float32."""

    def step() -> None:
        with torch.inference_mode():
            model.eval()(images)

    return step


def training(
    forward: Callable[[torch.Tensor], torch.Tensor],
    weights: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Callable[[], None]:
    """A training step in bf16 of a function that returns logits ``(..., B, C)``."""
    optimizer = build.optimizer(weights, Recipe(model={"name": NAME}, data="random", epochs=1))  # type: ignore[arg-type]

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = forward(images)
        rows = logits.float().reshape(-1, len(labels), logits.shape[-1])
        sum(F.cross_entropy(row, labels) for row in rows).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def steps(width: int, batch: int, device: str) -> dict[str, Callable[[], None]]:
    """All ways that are timed at one width."""
    torch.manual_seed(0)
    images, labels = (
        torch.randn(batch, 3, 32, 32, device=device),
        torch.randint(10, (batch,), device=device),
    )
    model, init = (timm.create_model(NAME, embed_dim=width, **TOKENS).to(device) for _ in range(2))
    masks = Masks({name: torch.rand(mask.shape) < 0.5 for name, mask in full(model).items()})
    frozen = masked(model, masks, baked=True).requires_grad_(False)
    baked, view, grafts = (
        masked(model, masks, baked=True),
        masked(model, masks),
        Grafts(init, frozen, masks).to(device),
    )
    plain = timm.create_model(NAME, embed_dim=width, **TOKENS).to(device)
    trained = {
        "training, plain": training(plain.train(), plain, images, labels),
        "training, masked": training(view.train(), model, images, labels),
        "training, twelve grafts": training(
            lambda shown: graft_logits(frozen, grafts, shown), grafts, images, labels
        ),
    }
    for block in (*plain.blocks.children(), *view.blocks, *frozen.blocks, *grafts):
        # as in the trainer: the bf16 backward of fused attention is slow on a CPU
        block.attn.fused_attn = device != "cpu"
    unmasked = timm.create_model(NAME, embed_dim=width, **TOKENS).to(device)
    return {
        "evaluation, plain": evaluation(unmasked, images),
        "evaluation, masked": evaluation(baked, images),
    } | trained


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = [
        f"batch {given.batch}, {timing.machine(given.device)}; median of {given.rounds} rounds",
        "",
        "| width | | ms | to plain |",
        "|---|---|---|---|",
    ]
    for width in given.widths:
        timed = steps(width, given.batch, given.device)
        clock = time.perf_counter if timing.is_cuda(given.device) else time.process_time
        times = timing.paired(timed, given.rounds, given.device, clock=clock)
        for name, own in times.items():
            plain = times[f"{name.partition(',')[0]}, plain"]
            own_ms = 1000 * statistics.median(own)
            shown = f"{own_ms:.{0 if own_ms > 10 else 2}f}"
            lines.append(f"| {width} | {name} | {shown} | {timing.ratio(own, plain):.2f} |")
    timing.report(lines, given.out)


if __name__ == "__main__":
    main()
