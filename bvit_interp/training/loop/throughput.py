"""What the machine can do and what a training run makes of it: precision, and model FLOPs
utilisation.

MFU (Chowdhery et al., "PaLM", 2022, appendix B) is the FLOPs the model needs, three times its
forward pass, attention products included, over what the hardware does in that time. The peak is
measured, not read from a data sheet.
"""

from __future__ import annotations

import resource
import time
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer

from bvit_interp.models import cost

BACKWARD = 3  # forward and backward together, in forward passes


@lru_cache
def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Multiply-adds x 2 a second of a large matrix product: the best of five, FLOP/s."""
    on_gpu = torch.device(device).type == "cuda"
    side = 8192 if on_gpu else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(5 + 1):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def precision(wanted: str, device: str) -> str:
    """bf16 or off: as `wanted`; for "auto" bf16 if a short trial on this device shows it to be a
    tenth faster.

    Processes with or without bf16 units differ by a factor of twenty, and their names do not tell.
    Under torchrun the first process decides for all.
    """
    if wanted != "auto":
        return wanted
    faster = [_faster(torch.device(device).type)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(faster)
    return faster[0]


@lru_cache
def _faster(kind: str) -> str:
    """The trial: forward and backward of a block, three times each; the best counts, and a GPU
    needs a large one."""
    batch, tokens, width = (8, 65, 128) if kind == "cpu" else (64, 197, 768)
    with torch.random.fork_rng(devices=[]):
        block: Any = Block(dim=width, num_heads=width // 64, attn_drop=0.0).to(kind)
        images = torch.randn(batch, tokens, width).to(kind)
    best = {}
    for word, on in (("off", False), ("bf16", True)):
        block.attn.fused_attn = kind != "cpu" or not on  # as a run trains, see `supervised`
        times = []
        for _ in range(4):
            _wait(kind)
            began = time.perf_counter()
            with torch.autocast(kind, torch.bfloat16, enabled=on):
                loss = block(images).float().square().mean()
            loss.backward()
            _wait(kind)
            times.append(time.perf_counter() - began)
        best[word] = min(times[1:])
    return (
        "bf16" if best["bf16"] < 0.9 * best["off"] else "off"
    )  # where they are level, float32 always


def fuses(device: str, precise: str, shape: tuple[int, int, int, int]) -> bool:
    """Whether torch's fused attention trains faster than the written-out one, forward and backward.

    On a CPU its bf16 backward is several times slower. On a GPU it is tried: short sequences fill
    its blocks badly.

    Parameters
    ----------
    precise : bf16 or off.
    shape : images, heads, tokens and width of a head.
    """
    if torch.device(device).type == "cpu":
        return precise == "off"
    return _fuses(device, precise, shape)


@lru_cache
def _fuses(device: str, precise: str, shape: tuple[int, int, int, int]) -> bool:
    dtype = torch.float32 if precise == "off" else torch.bfloat16
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def written_out() -> torch.Tensor:
        return (q * shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v

    ways = (lambda: F.scaled_dot_product_attention(q, k, v), written_out)
    best: list[float] = []
    for way in ways:
        times = []
        for _ in range(6):
            _wait(device)
            began = time.perf_counter()
            for _ in range(5):
                way().backward(v)
            _wait(device)
            times.append(time.perf_counter() - began)
        best.append(min(times[1:]))
    return best[0] <= best[1]


def utilisation(
    model: VisionTransformer, images_per_second: float, device: str, dtype: torch.dtype
) -> float:
    """MFU of training at `images_per_second` on one device, 0..1; dropped patches are not
    counted."""
    kept = 1 - getattr(model.patch_drop, "prob", 0.0)
    needed = BACKWARD * cost.flops(model, count_attention=True) * images_per_second
    return kept * needed / peak_flops(device, dtype)


def peak_memory(device: str) -> float:
    """Most memory the process held so far, GB: of the GPU, or of the machine where it trains on the
    CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
