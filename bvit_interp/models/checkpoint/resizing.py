"""Changes the image size of a model by resampling its position embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from bvit_interp.errors import CheckpointError


def resize(model: Any, size: tuple[int, int] | None, text: str) -> Any:
    """Set the image size of a model of timm, in place.

    Parameters
    ----------
    size : rows and columns of pixels; None for no change.
    text : the spec, for messages.

    Raises
    ------
    CheckpointError
        For a size that is not a multiple of the patch size, and for a model whose size is fixed.
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
    """Refuse an image size that is not a whole number of patches."""
    rows, columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    if size[0] % rows or size[1] % columns:
        raise CheckpointError(
            f"{text}: {size[0]} x {size[1]} pixels are not whole patches of {rows} x {columns}"
        )


def resample_huggingface(model: Any, size: tuple[int, int], text: str) -> None:
    """Set the image size of a vision transformer of Hugging Face, in place.

    Position embeddings that the model itself resamples at every forward stay as they are.
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
    """Whether a model of Hugging Face takes images of any size without a change."""
    return not any(
        hasattr(part, "position_embeddings") and hasattr(part, "image_size")
        for part in model.modules()
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
