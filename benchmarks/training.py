"""What a training step costs: bViT against the matched stacks, in time and in memory held by the optimiser.

    python benchmarks/training.py [--model cifar|base] [--batch 64] [--rounds 9] [--device cpu] [--compile] [--out FILE]

A step is what the trainer does: forward in bf16, loss, backward, clipping, AdamW and EMA. Every round times each model
once, in a new random order, so that drift hits all alike; ratios are medians over rounds of paired times. MFU is model
FLOPs (three forward passes, attention products included) over the measured peak of a matrix product.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

import bvit_interp.models.bvit  # noqa: F401  (registers the models with timm)
from bvit_interp.training import start
from bvit_interp.training.recipe import Recipe
from bvit_interp.training.throughput import utilisation

SHAPES: dict[str, dict[str, Any]] = {
    "cifar": {"img_size": 32, "patch_size": 4, "embed_dim": 256, "num_heads": 8, "num_classes": 10},
    "base": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "num_heads": 12, "num_classes": 1000},
}
NAMES = {
    "bViT, one block x 12": "bvit_small_patch16_224",
    "the matched stack (RMSNorm)": "vit_rms_small_patch16_224",
    "timm's ViT (LayerNorm)": "vit_base_patch16_224",
}


class Training:
    """One model in training; calling it takes a step."""

    def __init__(self, name: str, shape: dict[str, Any], batch: int, device: str, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model, self.device = timm.create_model(name, **shape).to(device).train(), device
        recipe = Recipe(model={"name": name}, data="random", epochs=1)
        self.optimizer, self.ema = start.optimizer(self.model, recipe), ModelEmaV3(self.model, decay=0.999)
        blocks = list(self.model.blocks.children())
        for block in blocks:
            block.attn.fused_attn = device != "cpu"  # as the trainer: its bf16 backward is slow on a CPU
            if compiled:
                block.compile()
        self.images = torch.randn(batch, 3, shape["img_size"], shape["img_size"], device=device)
        self.labels = torch.randint(shape["num_classes"], (batch,), device=device)

    def __call__(self) -> None:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            logits = self.model(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)

    def state_bytes(self, of_blocks: bool) -> int:
        """Bytes of AdamW's moments, of the blocks or of all tensors."""
        source: nn.Module = self.model.blocks if of_blocks else self.model
        found = (self.optimizer.state[p] for p in source.parameters())
        return sum(t.numel() * t.element_size() for state in found for t in state.values() if t.ndim)


def seconds(step: Callable[[], None], device: str) -> float:
    """Time of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="cifar")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs = {
        label: Training(name, SHAPES[given.model], given.batch, given.device, given.compile)
        for label, name in NAMES.items()
    }
    for step in runs.values():
        for _ in range(2):
            step()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(given.rounds):
        for label in random.sample(list(runs), len(runs)):
            times[label].append(seconds(runs[label], given.device))
    reference = times["the matched stack (RMSNorm)"]
    lines = [
        f"{given.model}, batch {given.batch}, {given.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}{', blocks compiled' if given.compile else ''}; median of {given.rounds} rounds",
        "",
        "| model | ms a step | to the matched stack | images/s | MFU | AdamW, blocks | AdamW, all |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, run in runs.items():
        median = statistics.median(times[label])
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times[label], reference, strict=True))
        per_second = given.batch / median
        used = utilisation(run.model, per_second, given.device, torch.bfloat16)
        blocks, everything = run.state_bytes(True) / 1e6, run.state_bytes(False) / 1e6
        lines.append(
            f"| {label} | {1000 * median:.0f} | {ratio:.2f} | {per_second:.0f} | {used:.3f} | {blocks:.2f} MB "
            f"| {everything:.2f} MB |"
        )
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
