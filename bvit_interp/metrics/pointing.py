"""The pointing game: does a map's maximum lie on the object?"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Real, Shaped
from torch import Tensor


def at_patch_centres(
    mask: Shaped[Tensor, "*batch height width"], grid: tuple[int, int]
) -> Shaped[Tensor, "*batch patches"]:
    """Value of each patch's centre pixel, patches row by row.

    The centre of patch (r, c) of p x q pixels is pixel (p r + p // 2, q c + q // 2); for 16-px
    patches (16 r + 8, 16 c + 8).

    Parameters
    ----------
    mask : height and width of at least one pixel per patch.
    grid : patch rows and columns.
    """
    (rows, columns), (height, width) = grid, mask.shape[-2:]
    p, q = height // rows, width // columns
    return mask[..., p // 2 :: p, q // 2 :: q][..., :rows, :columns].flatten(-2)


def dilate(
    mask: Bool[Tensor, "batch height width"], radius: float
) -> Bool[Tensor, "batch height width"]:
    """The pixels closer than `radius` to a pixel of the mask (strictly, as in TorchRay).

    Parameters
    ----------
    radius : pixels; for 0 the mask is returned.
    """
    if radius <= 0:
        return mask
    reach = math.ceil(radius) - 1
    offset = torch.arange(-reach, reach + 1, device=mask.device)
    disc = (offset[:, None] ** 2 + offset[None, :] ** 2) < radius**2
    counts = F.conv2d(mask[:, None].float(), disc[None, None].float(), padding=reach)
    return counts[:, 0] > 0.5


def point_hits(
    maps: Real[Tensor, "batch *maps patches"],
    positive: Bool[Tensor, "batch patches"],
    ignored: Bool[Tensor, "batch patches"],
) -> Float64[Tensor, " batch *maps"]:
    """Hits of the pointing game: whether the maximum of each map lies on the object.

    The game is that of Zhang et al. (ECCV 2016). The rule for ties is ours: if several patches are
    the maximum, the hit is the share of them that are positive, the expected value of a fair
    choice.

    Parameters
    ----------
    maps : saliency of the patches; only the position of the maximum counts.
    positive : patches whose point is on the object.
    ignored : patches whose point is on ignored pixels.

    Returns
    -------
    0..1; nan for a map whose every maximum is ignored.
    """
    maxima = maps == maps.amax(-1, keepdim=True)
    per_map = (slice(None), *[None] * (maps.ndim - 2), slice(None))
    counted = (maxima & ~ignored[per_map]).sum(-1).double()
    hits = (maxima & (positive & ~ignored)[per_map]).sum(-1).double()
    return torch.where(counted > 0, hits / counted, torch.nan)
