"""Maps over patches: entropy, distance and how alike they are."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(shares: Tensor) -> Tensor:
    """Shannon entropy ``-sum p ln p`` of distributions ``(..., K)``: ``(...)`` float64, nats; 0 ln
    0 is 0."""
    return torch.special.entr(shares.double()).sum(-1)


def grid_distances(grid: tuple[int, int]) -> Tensor:
    """Distances of the patches' centres, in patches: ``(P, P)`` float64, patches row by row.

    Their mean is the attention distance (Dosovitskiy et al., 2021) of uniform attention.
    """
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))
    return (places[:, None] - places).square().sum(-1).sqrt()


def unit_maps(maps: Tensor) -> Tensor:
    """Maps ``(..., P)`` brought to mean 0 and length 1, float64: their inner products are Pearson's
    correlations.

    A map constant up to rounding (spread below 1e-6 of its length) correlates with nothing and
    becomes 0.
    """
    centred = maps.double() - maps.double().mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    varied = length > 1e-6 * maps.double().norm(dim=-1, keepdim=True)
    return torch.where(varied, centred / length, 0.0)


def correlations(maps: Tensor) -> Tensor:
    """Correlations of every two of `unit_maps` ``(..., M, P)``: ``(..., M, M)``; nan with a map of
    zeros."""
    seen = maps.any(-1)
    return torch.where(seen[..., :, None] & seen[..., None, :], maps @ maps.mT, torch.nan)
