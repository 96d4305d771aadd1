"""What a training step costs: bViT against the matched stacks, in time and in memory held by the optimiser.

    python benchmarks/training.py [--model cifar|base] [--batch 64] [--rounds 9] [--device cpu] [--compile] [--out FILE]
    python benchmarks/training.py --model base --device cuda        batch 256

A step is the trainer's own: forward in bf16, loss, backward, clipping, AdamW and EMA, on a GPU replayed
from a CUDA graph where the trainer does so. Every round times each model once, in a new random order, so
that drift hits all alike. Ratios are medians over rounds of paired times. MFU is model FLOPs (three
forward passes, attention products included) over the measured peak of a matrix product. The goals of a
GPU count against 790 TFLOP/s, an H100's matrix products in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path
from typing import Any

import timing
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import bvit_interp.models.bvit  # noqa: F401  (registers the models with timm)
from bvit_interp.models import cost
from bvit_interp.training import start
from bvit_interp.training.recipe import Recipe
from bvit_interp.training.throughput import BACKWARD, utilisation

try:
    from bvit_interp.training.stepper import Stepper
except ImportError:  # a package from before it
    Stepper = None

SHAPES: dict[str, dict[str, Any]] = {
    "cifar": {"img_size": 32, "patch_size": 4, "embed_dim": 256, "num_heads": 8, "num_classes": 10},
    "base": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "num_heads": 12, "num_classes": 1000},
}
OURS, STACK = "bViT, one block x 12", "the matched stack (RMSNorm)"
NAMES = {
    OURS: "bvit_small_patch16_224",
    STACK: "vit_rms_small_patch16_224",
    "timm's ViT (LayerNorm)": "vit_base_patch16_224",
}
H100 = 790e12  # FLOP/s
GPU_BATCH, GPU_CALLS = {"cifar": 128, "base": 256}, {"cifar": 20, "base": 2}
GOALS = {"cifar": {"images/s": 40_000, "share of 790 TFLOP/s": 0.25}, "base": {"share of 790 TFLOP/s": 0.45}}


class Training:
    """One model in training; calling it takes a step."""

    def __init__(self, name: str, shape: dict[str, Any], batch: int, device: str, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model, self.device = timm.create_model(name, **shape).to(device).train(), device
        recipe = Recipe(model={"name": name}, data="random", epochs=1)
        self.optimizer, self.ema = start.optimizer(self.model, recipe), ModelEmaV3(self.model, decay=0.999)
        blocks = list(self.model.blocks.children())
        for block in blocks:
            block.attn.fused_attn = timing.is_cuda(device)  # as the trainer: its bf16 backward is slow on a CPU
            if compiled:
                block.compile()
        self.images = torch.randn(batch, 3, shape["img_size"], shape["img_size"], device=device)
        self.labels = torch.randint(shape["num_classes"], (batch,), device=device)
        self.taken, self.stream = 0, torch.cuda.Stream() if timing.is_cuda(device) else None
        timing.wait(device)
        self.step = self._eager if Stepper is None else self._stepper(recipe)

    def __call__(self) -> None:
        self.taken += 1
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            self.step()
            self.ema.update(self.model)

    def state_bytes(self, of_blocks: bool) -> int:
        """Bytes of AdamW's moments, of the blocks or of all tensors."""
        source: nn.Module = self.model.blocks if of_blocks else self.model
        found = (self.optimizer.state[p] for p in source.parameters())
        return sum(t.numel() * t.element_size() for state in found for t in state.values() if t.ndim)

    def flops(self) -> float:
        """Of a step."""
        return BACKWARD * cost.flops(self.model, count_attention=True) * len(self.images)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels)

    def _stepper(self, recipe: Recipe) -> Any:
        step = Stepper(recipe, self.model, self.optimizer, self._loss, captures=timing.is_cuda(self.device))
        return lambda: step(self.images, self.labels, 0, self.taken)

    def _eager(self) -> None:
        self._loss(self.images, self.labels).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="cifar")
    parser.add_argument("--batch", type=int, help="images a step (64; on a GPU 128 for cifar, 256 for base)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, help="embedding dimension in place of the model's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    given = parser.parse_args()
    on_gpu = timing.is_cuda(given.device)
    batch = given.batch or (GPU_BATCH[given.model] if on_gpu else 64)
    shape = SHAPES[given.model] | ({"embed_dim": given.width} if given.width else {})
    runs = {label: Training(name, shape, batch, given.device, given.compile) for label, name in NAMES.items()}
    times = timing.paired(
        runs, given.rounds, given.device, warm=6 if on_gpu else 2, calls=GPU_CALLS[given.model] if on_gpu else 1
    )
    lines = [
        f"{given.model}, batch {batch}, {timing.machine(given.device)}{', blocks compiled' if given.compile else ''}; "
        f"median of {given.rounds} rounds",
        "",
        f"| model | ms a step | to the matched stack | images/s | MFU |{' of 790 TFLOP/s |' if on_gpu else ''} "
        "AdamW, blocks | AdamW, all |",
        f"|---|---|---|---|---|---|---|{'---|' if on_gpu else ''}",
    ]
    reached = {}
    for label, run in runs.items():
        median = statistics.median(times[label])
        per_second = batch / median
        used = utilisation(run.model, per_second, given.device, torch.bfloat16)
        reached[label] = {"images/s": per_second, "share of 790 TFLOP/s": run.flops() / median / H100}
        share = f" {reached[label]['share of 790 TFLOP/s']:.3f} |" if on_gpu else ""
        blocks, everything = run.state_bytes(True) / 1e6, run.state_bytes(False) / 1e6
        lines.append(
            f"| {label} | {1000 * median:.{2 if on_gpu else 0}f} | {timing.ratio(times[label], times[STACK]):.2f} "
            f"| {per_second:.0f} | {used:.3f} |{share} {blocks:.2f} MB | {everything:.2f} MB |"
        )
    if on_gpu:
        lines += ["", *(timing.verdict(name, reached[OURS][name], goal) for name, goal in GOALS[given.model].items())]
    timing.report(lines, given.out)


if __name__ == "__main__":
    main()
