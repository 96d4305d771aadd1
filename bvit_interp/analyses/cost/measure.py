"""Parameters and FLOPs by counting, times by measuring.

Tables 1, 2 and 6 of bViT (arXiv 2605.10661), and the milliseconds of Table 5. Parameters and FLOPs
are counted from shapes (`bvit_interp.models.cost`). Times are measured: forward passes of one image
(median and quartiles) and of a batch, the models taking turns run by run, so that a machine that
slows down slows all of them alike. Give a bViT with its matched stack (`vit_rms_*`) for the
comparison of Table 5: equal FLOPs, the weights of one block instead of twelve.

There is no null: no number here could arise by chance; counts are exact, and quartiles show how
much a time varies. No image is read: seeded random pixels of the model's size are timed, and of the
options for images only `batch_size` has an effect.

Cost: `runs` + 3 images and 5 batches per model; one image takes bViT-B half a second on one core of
a Xeon server. Expected: bViT-S, -B, -L 2.5, 8.6, 14.6 M parameters and 8.5, 33.7, 119.3 GFLOPs,
bViT-fl 134.1; bViT-B and ViT-B take the same time (7.36 and 7.52 ms in Table 5, which names no
hardware), so that only parameters are saved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from bvit_interp.analyses.cost import COLUMNS, Config
from bvit_interp.analyses.cost.timing import interleaved_times, peak_memory
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.models.cost import flops, parameters, parameters_by_part
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model
from bvit_interp.results import rank_and_world

_WARM_UP = 3  # forward passes of one image before the timed ones
_BATCHES = 3  # timed batches


@for_any_model
def measure(models: Mapping[str, Model], data: Samples | None, config: Config) -> pd.DataFrame:
    """Cost of every model.

    Parameters
    ----------
    models : name -> model; they are not changed. In another data type they are timed as copies.
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
    timed = [_as_timed(model, config) for model in models.values()]
    latencies = 1e3 * interleaved_times(timed, 1, warm_up=_WARM_UP, runs=config.runs)
    peaks = [peak_memory(model, config.batch_size) for model in timed]
    batch_times = interleaved_times(timed, config.batch_size, warm_up=1, runs=_BATCHES)
    rows = []
    for i, (name, model) in enumerate(models.items()):
        low, median, high = np.quantile(latencies[i], (0.25, 0.5, 0.75))
        rows.append(
            {
                "model": name,
                **counts(model),
                "latency_ms": median,
                "latency_low": low,
                "latency_high": high,
                "latency_ratio": np.median(latencies[i] / latencies[0]),
                "throughput": config.batch_size / np.median(batch_times[i]),
                "peak_memory": peaks[i],
                "runs": config.runs,
                "batch_size": config.batch_size,
                "image_size": "x".join(map(str, layout_of(model).image_size)),
                "device": _device_name(device_of(model)),
                "threads": torch.get_num_threads(),
                "dtype": config.dtype,
            }
        )
    return pd.DataFrame(rows)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The whole table."""
    return frame


def counts(model: Model) -> dict[str, Any]:
    """Parameters in all and by part, steps, and FLOPs: the exact columns of the table."""
    total = parameters(model)
    try:
        parts: dict[str, float] = {**parameters_by_part(model)}
    except UserError:  # of a model that is not ours only the blocks are known
        parts = dict.fromkeys(("embedding", "norm", "head"), math.nan)
        parts["blocks"] = parameters(model.blocks)
    return {
        "parameters": total,
        "backbone": total - parts["head"],
        **parts,
        "steps": len(model.blocks),
        "gflops": _gflops(model, count_attention=False),
        "gflops_attention": _gflops(model, count_attention=True),
    }


def _gflops(model: Model, *, count_attention: bool) -> float:
    try:
        return flops(model, count_attention=count_attention) / 1e9
    except UserError:  # parts whose cost is not known
        return math.nan


def _as_timed(model: Model, config: Config) -> Model:
    """The model in evaluation mode and the requested data type; a copy where it is not so yet."""
    dtype = getattr(torch, config.dtype)
    ready = next(model.parameters()).dtype == dtype and not model.training
    return model if ready else copy.deepcopy(model).eval().to(dtype)


def _device_name(device: torch.device) -> str:
    """The name of the GPU, or the instruction set of the CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} ({name})"
