"""Cost of a training step of a bViT and its stacks: time, and memory of the optimiser.

    python benchmarks/training.py [--model cifar|base] [--batch 64] [--rounds 9] [--device cpu]
        [--compile] [--out FILE]
    python benchmarks/training.py --model base --device cuda        batch 256

A step is that of the trainer: forward in bf16, loss, backward, clipping, AdamW and EMA; on a GPU it
is replayed from a CUDA graph if the trainer does so. Every round times each model once, in a new
random order, so that drift affects all models equally. Ratios are medians over rounds of paired
times. MFU is model FLOPs (three forward passes, with attention products) divided by the measured
peak of a matrix product. The goals on a GPU are relative to 790 TFLOP/s, the speed of bf16 matrix
products on an H100.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from bvit_interp.training.loop import build
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.throughput import FORWARD_PASSES, utilisation

try:
    from bvit_interp.training.loop.stepper import Stepper
except ImportError:  # an older version of the package
    Stepper = None

SHAPES: dict[str, dict[str, Any]] = {
    "cifar": {"img_size": 32, "patch_size": 4, "embed_dim": 256, "num_heads": 8, "num_classes": 10},
    "base": {
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": 768,
        "num_heads": 12,
        "num_classes": 1000,
    },
}
OURS, STACK, COMPILED = (
    "bViT, one block x 12",
    "the matched stack (RMSNorm)",
    "bViT, its block compiled",
)
NAMES = {
    OURS: "bvit_small_patch16_224",
    STACK: "vit_rms_small_patch16_224",
    "timm's ViT (LayerNorm)": "vit_base_patch16_224",
}
WARM = 5  # steps; on a GPU the fourth is captured
H100 = 790e12  # FLOP/s
GPU_BATCH, GPU_CALLS = {"cifar": 128, "base": 256}, {"cifar": 20, "base": 2}
GOALS = {
    "cifar": {"images/s": 40_000, "share of 790 TFLOP/s": 0.25},
    "base": {"share of 790 TFLOP/s": 0.45},
}


class Training:
    """A model in training; a call makes one training step."""

    def __init__(
        self, name: str, shape: dict[str, Any], batch: int, device: str, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.model, self.device = timm.create_model(name, **shape).to(device).train(), device
        recipe = Recipe(model={"name": name}, data="random", epochs=1)
        self.optimizer, self.ema = (
            build.optimizer(self.model, recipe),
            ModelEmaV3(self.model, decay=0.999),
        )
        blocks = list(self.model.blocks.children())
        for block in blocks:
            # as in the trainer: the bf16 backward of fused attention is slow on a CPU
            block.attn.fused_attn = timing.is_cuda(device)
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
        return sum(
            t.numel() * t.element_size() for state in found for t in state.values() if t.ndim
        )

    def flops(self) -> float:
        """FLOPs of a training step."""
        return FORWARD_PASSES * cost.flops(self.model, count_attention=True) * len(self.images)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            logits = self.model(images)
        return F.cross_entropy(logits.float(), labels)

    def _stepper(self, recipe: Recipe) -> Any:
        step = Stepper(
            recipe, self.model, self.optimizer, self._loss, captures=timing.is_cuda(self.device)
        )
        return lambda: step(self.images, self.labels, 0, self.taken)

    def _eager(self) -> None:
        self._loss(self.images, self.labels).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Cost:
    """Time and memory of the training steps of one model."""

    times: list[float]
    """Seconds per step in every round."""
    first: float
    """Seconds of the first steps together, with compiling and capturing."""
    mfu: float
    share: float
    """FLOP/s divided by those of an H100."""
    blocks: float
    everything: float
    """MB of AdamW's moments, of the blocks and of all tensors."""

    @property
    def step(self) -> float:
        """Seconds per step."""
        return statistics.median(self.times)


def measure(
    makers: Mapping[str, Callable[[], Training]], given: argparse.Namespace, batch: int
) -> dict[str, Cost]:
    """Costs of the models, timed in rounds together."""
    device, on_gpu = given.device, timing.is_cuda(given.device)
    runs = {label: make() for label, make in makers.items()}
    warm = WARM if on_gpu else 2
    first = {label: warm * timing.seconds(run, device, warm) for label, run in runs.items()}
    calls = GPU_CALLS[given.model] if on_gpu else 1
    times = timing.paired(runs, given.rounds, device, warm=0, calls=calls)
    costs = {}
    for label, run in runs.items():
        median = statistics.median(times[label])
        costs[label] = Cost(
            times[label],
            first[label],
            utilisation(run.model, batch / median, device, torch.bfloat16),
            run.flops() / median / H100,
            run.state_bytes(True) / 1e6,
            run.state_bytes(False) / 1e6,
        )
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(SHAPES), default="cifar")
    parser.add_argument(
        "--batch", type=int, help="images per step (64; on a GPU 128 for cifar, 256 for base)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, help="embedding dimension instead of the model's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    given = parser.parse_args()
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    on_gpu = timing.is_cuda(given.device)
    batch = given.batch or (GPU_BATCH[given.model] if on_gpu else 64)
    shape = SHAPES[given.model] | ({"embed_dim": given.width} if given.width else {})
    makers = {
        label: partial(Training, name, shape, batch, given.device, given.compile)
        for label, name in NAMES.items()
    }
    if on_gpu:
        makers[COMPILED] = partial(Training, NAMES[OURS], shape, batch, given.device, True)
    alone = on_gpu and given.model == "base"  # four captured steps need too much memory
    groups = (
        [[label] for label in makers] if alone else [[*NAMES], *([[COMPILED]] if on_gpu else [])]
    )
    costs: dict[str, Cost] = {}
    notes = []
    for group in groups:
        try:
            costs |= measure({label: makers[label] for label in group}, given, batch)
        except RuntimeError as error:  # the other rows do not need it
            if OURS in group and not isinstance(error, torch.OutOfMemoryError):
                raise
            notes.append(f"{', '.join(group)}: {str(error).strip().partition(chr(10))[0]}")
        gc.collect()
        torch.cuda.empty_cache()
        if given.out is not None and costs:  # compiling may take longer than the time limit
            given.out.write_text("\n".join(_lines(costs, given, batch, alone, notes)) + "\n")
    timing.report(_lines(costs, given, batch, alone, notes), given.out)


def _lines(
    costs: Mapping[str, Cost],
    given: argparse.Namespace,
    batch: int,
    alone: bool,
    notes: Sequence[str],
) -> list[str]:
    """The table, and on a GPU whether the goals were met."""
    on_gpu = timing.is_cuda(given.device)
    lines = [
        f"{given.model}, batch {batch},"
        f" {timing.machine(given.device)}{', blocks compiled' if given.compile else ''}; "
        f"median of {given.rounds} rounds{', one model after the other' if alone else ''}",
        "",
        "| model | ms per step | to the matched stack | images/s | MFU"
        f" |{' of 790 TFLOP/s |' if on_gpu else ''} "
        "AdamW, blocks | AdamW, all |",
        f"|---|---|---|---|---|---|---|{'---|' if on_gpu else ''}",
    ]
    for label, own in costs.items():
        ratio = f"{timing.ratio(own.times, costs[STACK].times):.2f}" if STACK in costs else "-"
        share = f" {own.share:.3f} |" if on_gpu else ""
        lines.append(
            f"| {label} | {1000 * own.step:.{2 if on_gpu else 0}f} | {ratio} |"
            f" {batch / own.step:.0f} | {own.mfu:.3f} "
            f"|{share} {own.blocks:.2f} MB | {own.everything:.2f} MB |"
        )
    lines += ["", *notes] if notes else []
    if on_gpu:
        lines += [
            "",
            *(f"first {WARM} steps of {label}: {own.first:.1f} s" for label, own in costs.items()),
            "",
        ]
        lines += _verdicts(
            {label: costs[label] for label in (OURS, COMPILED) if label in costs},
            given.model,
            batch,
        )
    return lines


def _verdicts(costs: Mapping[str, Cost], model: str, batch: int) -> list[str]:
    """Whether the faster of our two ways meets the goals."""
    if not costs:
        return []
    label, best = min(costs.items(), key=lambda item: item[1].step)
    reached = {"images/s": batch / best.step, "share of 790 TFLOP/s": best.share}
    return [
        timing.verdict(f"{name}, {label}", reached[name], goal)
        for name, goal in GOALS[model].items()
    ]


if __name__ == "__main__":
    main()
