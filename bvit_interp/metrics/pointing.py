"""Points and masks: where an arg-max lies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def at_patch_centres(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Value of each patch's centre pixel: mask ``(B, rows * p, cols * q)`` -> ``(B, rows * cols)``.

    The centre of patch (r, c) is pixel (p r + p // 2, q c + q // 2); for 16-px patches (16 r + 8,
    16 c + 8).
    """
    (rows, cols), (height, width) = grid, mask.shape[-2:]
    p, q = height // rows, width // cols
    return mask[..., p // 2 :: p, q // 2 :: q][..., :rows, :cols].flatten(-2)


def near(positive: Tensor, tolerance: float) -> Tensor:
    """Pixels closer than `tolerance` px to a positive one (strictly, as TorchRay); the same mask
    for 0.

    Parameters
    ----------
    positive : bool ``(B, height, width)``.
    tolerance : radius in pixels.
    """
    if tolerance <= 0:
        return positive
    reach = math.ceil(tolerance) - 1
    offset = torch.arange(-reach, reach + 1, device=positive.device)
    disc = (offset[:, None] ** 2 + offset[None, :] ** 2) < tolerance**2
    counts = F.conv2d(positive[:, None].float(), disc[None, None].float(), padding=reach)
    return counts[:, 0] > 0.5


def point_hits(maps: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """Pointing-game hits: does the maximum of each map lie on the object?

    Ties share the point: the hit is the fraction of the tied patches that are positive (the
    expected value of a fair choice). A map whose every maximum lies on ignored ground has no hit:
    nan.

    Parameters
    ----------
    maps : saliency of the patches ``(B, ..., P)``; only its maximum counts.
    positive : bool ``(B, P)``, patches whose point is on the object.
    ignored : bool ``(B, P)``, patches whose point is on ignored ground.

    Returns
    -------
    ``(B, ...)`` float64 in 0..1 or nan (Zhang et al., ECCV 2016, with the expectation over ties as
    ours).
    """
    tied = maps == maps.amax(-1, keepdim=True)
    between = (slice(None), *[None] * (maps.ndim - 2), slice(None))
    counted = (tied & ~ignored[between]).sum(-1).double()
    hits = (tied & (positive & ~ignored)[between]).sum(-1).double()
    return torch.where(counted > 0, hits / counted, torch.nan)
