"""Time of runs that stop at exits, and of the plain forward."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.models.exits import Exits, run_with_exits
from bvit_interp.models.stepping import device_of


@torch.inference_mode()
def exit_times(
    unrolled: VisionTransformer,
    exits: Exits,
    images: Float[Tensor, "batch channels height width"],
    thresholds: Sequence[float],
    batch_size: int,
) -> Float[np.ndarray, "runs batches"]:
    """Seconds of each batch: row 0 of a plain forward, then of a run with each threshold.

    The plain forward and all thresholds take turns on every batch, so that a machine that slows
    down slows all of them alike.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : normalised; those that do not fill a batch are left out.
    batch_size : at most the number of images.
    """
    device = device_of(unrolled)
    batches = [part.to(device) for part in images.split(batch_size) if len(part) == batch_size]
    seconds = np.empty((len(thresholds) + 1, len(batches)))
    unrolled(batches[0])  # warm-up
    for j, batch in enumerate(batches):
        for i, threshold in enumerate([None, *thresholds]):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            if threshold is None:
                unrolled(batch)
            else:
                run_with_exits(unrolled, exits, batch, threshold)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[i, j] = time.perf_counter() - began
    return seconds
