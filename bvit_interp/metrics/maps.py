"""Maps over patches: entropy, distances and correlations."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def entropy(shares: Float[Tensor, "*batch outcomes"]) -> Float64[Tensor, "*batch"]:
    """Shannon entropy ``-sum p ln p`` of distributions, nats; 0 ln 0 is 0."""
    return torch.special.entr(shares.double()).sum(-1)


def grid_distances(grid: tuple[int, int]) -> Float64[Tensor, "patches patches"]:
    """Distances between the centres of the patches of a grid, in patches; patches row by row.

    Their mean is the attention distance (Dosovitskiy et al., 2021) of uniform attention.
    """
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    centres = torch.cartesian_prod(rows, columns)
    return (centres[:, None] - centres).square().sum(-1).sqrt()


def unit_maps(maps: Float[Tensor, "*batch patches"]) -> Float64[Tensor, "*batch patches"]:
    """Maps with mean 0 and length 1: their inner products are Pearson's correlations.

    A map that is constant up to rounding (spread below 1e-6 of its length) correlates with no other
    and becomes 0.
    """
    centred = maps.double() - maps.double().mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    varied = length > 1e-6 * maps.double().norm(dim=-1, keepdim=True)
    return torch.where(varied, centred / length, 0.0)


def correlations(
    maps: Float[Tensor, "*batch maps patches"],
) -> Float[Tensor, "*batch maps maps"]:
    """Correlations of every pair of `unit_maps`; nan if one of the two is zero."""
    varied = maps.any(-1)
    both = varied[..., :, None] & varied[..., None, :]
    return torch.where(both, maps @ maps.mT, torch.nan)
