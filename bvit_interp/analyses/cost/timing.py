"""Time and memory of forward passes on random pixels.

Models are timed in turns, run by run, so that a machine that slows down slows all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bvit_interp.errors import UserError
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of


@torch.inference_mode()
def interleaved_times(
    models: Sequence[Model], n_images: int, *, warm_up: int, runs: int
) -> Float[np.ndarray, "models runs"]:
    """Seconds of each forward pass of `n_images` images, the models taking turns.

    Parameters
    ----------
    models : in evaluation mode.
    n_images : number of images per forward pass.
    warm_up : number of turns that are not timed, before the timed ones.
    runs : number of timed turns.
    """
    pixels = [random_pixels(model, n_images) for model in models]
    seconds = np.empty((len(models), runs))
    for turn in tqdm(range(-warm_up, runs), desc=f"cost, {n_images} images", unit="turn"):
        for i, (model, images) in enumerate(zip(models, pixels, strict=True)):
            began = _now(images.device)
            model(images)
            elapsed = _now(images.device) - began
            if turn >= 0:
                seconds[i, turn] = elapsed
    return seconds


@torch.inference_mode()
def peak_memory(model: Model, n_images: int) -> float:
    """GB of GPU memory that the weights and one forward pass of `n_images` images take; nan on a
    CPU.

    Raises
    ------
    UserError
        If the images do not fit in GPU memory.
    """
    device = device_of(model)
    if device.type != "cuda":
        return math.nan
    images = random_pixels(model, n_images)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        model(images)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of GPU memory with {n_images} images: use a smaller batch-size"
        ) from None
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return (torch.cuda.max_memory_allocated(device) - before + weights) / 1e9


def random_pixels(model: Model, n_images: int) -> Float[Tensor, "batch channels height width"]:
    """The same random pixels at every call, on the device and in the data type of the weights."""
    layout = layout_of(model)
    shape = (n_images, layout.channels, *layout.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return pixels.to(next(model.parameters()))


def _now(device: torch.device) -> float:
    """The clock, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
