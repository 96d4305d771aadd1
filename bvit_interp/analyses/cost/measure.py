"""What does a model cost: parameters, FLOPs, and time on this machine?

Tables 1, 2 and 6 of bViT (arXiv 2605.10661), and the milliseconds of Table 5. Parameters and FLOPs
are counted from shapes (`bvit_interp.models.cost`). Times are measured: forward passes of one image
(median and quartiles) and of a batch, the models taking turns run by run, so that a machine that
slows down slows all. Give a bViT with its matched stack (`vit_rms_*`) for the comparison of Table
5: equal FLOPs, one block's weights instead of twelve.

No null: nothing here could come out of chance; counts are exact, and quartiles tell how sure a time
is. No image is read: seeded random pixels of the model's size are timed, and of the options of
reading only `batch_size` matters.

Cost: `runs` + 3 images and 5 batches a model; an image takes bViT-B half a second on one core of a
Xeon server. Expected: bViT-S, -B, -L 2.5, 8.6, 14.6 M parameters and 8.5, 33.7, 119.3 GFLOPs,
bViT-fl 134.1; bViT-B and ViT-B take the same time (7.36 and 7.52 ms in Table 5, which names no
hardware), so that only parameters are saved.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm import tqdm

from bvit_interp.analyses.cost import COLUMNS, Config
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.models.cost import flops, parameters
from bvit_interp.results import rank_and_world

_WARM_UP, _BATCHES = 3, 3  # forwards of one image before timing; timed batches


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Cost of every model, without looking at `data`.

    Parameters
    ----------
    models : name -> model; they come back as they came. In another type they are timed as copies.
    data : not used.

    Returns
    -------
    A table of `COLUMNS`.

    Raises
    ------
    UserError
        In several processes, which would disturb each other, and for a batch that does not fit in
        GPU memory.
    """
    if rank_and_world()[1] > 1:
        raise UserError(
            "cost is timed in one process, for several disturb each other: run it without torchrun"
        )
    ready = [_ready(model, config) for model in models.values()]
    with torch.inference_mode():
        milliseconds = 1e3 * _take_turns(ready, 1, _WARM_UP, config.runs)
        peaks = [_peak_memory(model, config.batch_size) for model in ready]
        seconds = _take_turns(ready, config.batch_size, 1, _BATCHES)
    rows = []
    for i, (name, model) in enumerate(models.items()):
        low, median, high = np.quantile(milliseconds[i], (0.25, 0.5, 0.75))
        rows.append(
            {
                "model": name,
                **_count(model),
                "latency_ms": median,
                "latency_low": low,
                "latency_high": high,
                "latency_ratio": np.median(milliseconds[i] / milliseconds[0]),
                "throughput": config.batch_size / np.median(seconds[i]),
                "peak_memory": peaks[i],
                "runs": config.runs,
                "batch_size": config.batch_size,
                "image_size": "x".join(map(str, model.patch_embed.img_size)),
                "device": _device_name(model),
                "threads": torch.get_num_threads(),
                "dtype": config.dtype,
            }
        )
    return pd.DataFrame(rows)[list(COLUMNS)]


def _count(model: VisionTransformer) -> dict[str, Any]:
    """Parameters by part, steps and FLOPs."""
    parts = {"embedding": 0, "blocks": 0, "norm": 0, "head": 0}
    for name, parameter in model.named_parameters():
        starts = {
            "blocks.": "blocks",
            "norm": "norm",
            "fc_norm": "norm",
            "head": "head",
            "attn_pool": "head",
        }
        part = next((part for start, part in starts.items() if name.startswith(start)), "embedding")
        parts[part] += parameter.numel()
    total = parameters(model)
    gflops = {}
    for column, with_attention in (("gflops", False), ("gflops_attention", True)):
        try:
            gflops[column] = flops(model, count_attention=with_attention) / 1e9
        except UserError:  # parts whose cost is not known
            gflops[column] = math.nan
    return {
        "parameters": total,
        "backbone": total - parts["head"],
        **parts,
        "steps": len(model.blocks),
        **gflops,
    }


def _ready(model: VisionTransformer, config: Config) -> VisionTransformer:
    """The model in evaluation mode and the asked type; a copy where it is not so already."""
    dtype = getattr(torch, config.dtype)
    as_asked = next(model.parameters()).dtype == dtype and not model.training
    return model if as_asked else copy.deepcopy(model).eval().to(dtype)


def _pixels(model: VisionTransformer, count: int) -> Tensor:
    """The same random pixels at every call, where and in the type the weights are."""
    shape = (count, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        next(model.parameters())
    )


def _take_turns(models: list[VisionTransformer], count: int, warm_up: int, runs: int) -> np.ndarray:
    """Seconds of each forward pass of `count` images ``(models, runs)``, the models taking
    turns."""

    def now(images: Tensor) -> float:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter()

    pixels, seconds = [_pixels(model, count) for model in models], np.empty((len(models), runs))
    for turn in tqdm(range(-warm_up, runs), desc=f"cost, {count} images", unit="turn"):
        for i, (model, images) in enumerate(zip(models, pixels, strict=True)):
            began = now(images)
            model(images)
            elapsed = now(images) - began
            if turn >= 0:
                seconds[i, turn] = elapsed
    return seconds


def _peak_memory(model: VisionTransformer, count: int) -> float:
    """GB of GPU memory that the weights and one forward pass of `count` images take; nan on a
    CPU."""
    weights = list(model.parameters())
    if not weights[0].is_cuda:
        return math.nan
    device, images = weights[0].device, _pixels(model, count)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        model(images)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory with {count} images: use a smaller batch-size"
        ) from None
    own = sum(weight.numel() * weight.element_size() for weight in weights)
    return (torch.cuda.max_memory_allocated(device) - before + own) / 1e9


def _device_name(model: VisionTransformer) -> str:
    """The GPU's name, or the CPU's instruction set."""
    device = next(model.parameters()).device
    name = (
        torch.cuda.get_device_name
        if device.type == "cuda"
        else lambda _: torch.backends.cpu.get_cpu_capability()
    )
    return f"{device.type} ({name(device)})"


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All of it."""
    return frame
