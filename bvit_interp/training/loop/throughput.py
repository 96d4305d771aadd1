"""What the machine can do: precision, fused attention, peak and utilisation.

Model FLOPs utilisation, MFU (Chowdhery et al., "PaLM", 2022, appendix B), is the number of FLOPs
that the model needs divided by what the hardware can do in the same time. The model needs three
times its forward pass, attention products included. The peak of the hardware is measured, not read
from a data sheet.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer

from bvit_interp.models import cost

FORWARD_PASSES = 3  # cost of a forward and a backward pass together, in forward passes
_FASTER = 0.9  # bf16 is used if it takes less than this share of the time of float32


@lru_cache
def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of six; a multiply-add counts as two."""
    side = 8192 if _is_gpu(device) else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / min(_seconds(lambda: a @ a, device, 6))


def precision(wanted: str, device: str) -> str:
    """The precision of training: bf16 or off.

    For "auto" it is bf16 if a short trial on this device is at least a tenth faster with it:
    processors with and without bf16 units differ by a factor of twenty, and their names do not say
    which they are. Under torchrun the first process decides for all.

    Parameters
    ----------
    wanted : bf16, off or auto.
    """
    if wanted != "auto":
        return wanted
    chosen = [_faster_precision(torch.device(device).type)]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen)
    return chosen[0]


@lru_cache
def _faster_precision(device_type: str) -> str:
    """The trial: forward and backward passes of one block; the best of three counts.

    A GPU needs a large block to show a difference.
    """
    on_cpu = device_type == "cpu"
    batch, tokens, width = (8, 65, 128) if on_cpu else (64, 197, 768)
    with torch.random.fork_rng(devices=[]):
        block: Any = Block(dim=width, num_heads=width // 64, attn_drop=0.0).to(device_type)
        images = torch.randn(batch, tokens, width).to(device_type)

    def step(on: bool) -> None:
        with torch.autocast(device_type, torch.bfloat16, enabled=on):
            loss = block(images).float().square().mean()
        loss.backward()

    best = {}
    for name, on in (("off", False), ("bf16", True)):
        block.attn.fused_attn = not on_cpu or not on  # as in training, see `prepare`
        best[name] = min(_seconds(partial(step, on), device_type, 4)[1:])
    return "bf16" if best["bf16"] < _FASTER * best["off"] else "off"


def prefers_fused_attention(
    device: str, training_precision: str, shape: tuple[int, int, int, int]
) -> bool:
    """Whether training is faster with torch's fused attention than with written-out products.

    On a CPU its bf16 backward pass is several times slower. On a GPU both are tried, because it
    may be slower for short sequences.

    Parameters
    ----------
    training_precision : bf16 or off.
    shape : number of images, heads and tokens, and the width of a head.
    """
    if not _is_gpu(device):
        return training_precision == "off"
    return _fused_is_faster(device, training_precision, shape)


@lru_cache
def _fused_is_faster(
    device: str, training_precision: str, shape: tuple[int, int, int, int]
) -> bool:
    dtype = torch.float32 if training_precision == "off" else torch.bfloat16
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def fused() -> None:
        for _ in range(5):
            F.scaled_dot_product_attention(q, k, v).backward(v)

    def written_out() -> None:
        for _ in range(5):
            ((q * shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v).backward(v)

    best = [min(_seconds(attention, device, 6)[1:]) for attention in (fused, written_out)]
    return best[0] <= best[1]


def utilisation(
    model: VisionTransformer, images_per_second: float, device: str, dtype: torch.dtype
) -> float:
    """MFU of training at `images_per_second` on one device, 0..1.

    Patches that are left out are not counted.
    """
    kept = 1 - getattr(model.patch_drop, "prob", 0.0)
    needed = FORWARD_PASSES * cost.flops(model, count_attention=True) * images_per_second
    return kept * needed / peak_flops(device, dtype)


def peak_memory(device: str) -> float:
    """Most memory that the process has used so far, GB: of the GPU, or of the machine on a CPU."""
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _seconds(work: Callable[[], Any], device: str, times: int) -> list[float]:
    """Time of each of several calls, seconds."""
    seconds = []
    for _ in range(times):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def _wait(device: str) -> None:
    if _is_gpu(device):
        torch.cuda.synchronize(device)


def _is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"
