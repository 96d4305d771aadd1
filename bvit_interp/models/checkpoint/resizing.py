"""A model for images of another size: its position embeddings are resampled."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from bvit_interp.errors import CheckpointError


def resize(model: Any, size: tuple[int, int] | None, text: str) -> Any:
    """Bring a model of timm to a size of images, in place.

    Parameters
    ----------
    size : rows and columns of pixels; None for no change.
    text : the spec, for messages.

    Raises
    ------
    CheckpointError
        For a size that is no multiple of the patch, and a model that has no other size.
    """
    if size is None or size == tuple(getattr(getattr(model, "patch_embed", None), "img_size", ())):
        return model
    if not hasattr(model, "set_input_size"):
        raise CheckpointError(
            f"{text}: {type(model).__name__} has no other image size than its own"
        )
    check_patches(size, model.patch_embed.patch_size, text)
    model.set_input_size(img_size=size)
    return model


def check_patches(size: tuple[int, int], patch: Any, text: str) -> None:
    """Refuse a size that patches do not fill."""
    rows, columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    if size[0] % rows or size[1] % columns:
        raise CheckpointError(
            f"{text}: {size[0]} x {size[1]} pixels are not whole patches of {rows} x {columns}"
        )


def resample_huggingface(model: Any, size: tuple[int, int], text: str) -> None:
    """Bring a vision transformer of Hugging Face to a size of images, in place.

    What resamples its position embeddings itself, at every forward, stays as it is.
    """
    model.image_size = size
    for embeddings in model.modules():
        positions = getattr(embeddings, "position_embeddings", None)
        patches: Any = getattr(embeddings, "patch_embeddings", None)
        if patches is not None:
            check_patches(size, patches.patch_size, text)
        if not isinstance(positions, nn.Parameter) or not hasattr(embeddings, "image_size"):
            continue
        patch = _pair(patches.patch_size)
        old, new = (
            [rows // patch[0], columns // patch[1]]
            for rows, columns in (_pair(embeddings.image_size), size)
        )
        with torch.no_grad():
            resampled = resample_abs_pos_embed(
                positions, new, old, num_prefix_tokens=positions.shape[1] - math.prod(old)
            )
        embeddings.position_embeddings = nn.Parameter(resampled)
        embeddings.image_size = patches.image_size = size
        patches.num_patches = math.prod(new)


def takes_other_sizes(model: nn.Module) -> bool:
    """Whether a model of Hugging Face takes images of any size as it is."""
    return not any(
        hasattr(part, "position_embeddings") and hasattr(part, "image_size")
        for part in model.modules()
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
