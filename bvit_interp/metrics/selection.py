"""Masks that keep the largest scores or drop the smallest."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


def keep_largest(
    scores: Shaped[Tensor, "*shape"], count: int, dim: int | None = None
) -> Bool[Tensor, "*shape"]:
    """Mask of the `count` largest scores.

    Parameters
    ----------
    scores : larger scores are kept first.
    count : how many to keep, at least 0.
    dim : keep that many in each slice along this dimension; by default in the whole tensor.

    Returns
    -------
    True where a score is kept. Among equal scores, the first are kept.
    """
    return _ranks(-scores, dim) < count


def drop_smallest(
    scores: Shaped[Tensor, "*shape"], count: int, dim: int | None = None
) -> Bool[Tensor, "*shape"]:
    """Mask without the `count` smallest scores; among equal scores, the first are dropped."""
    return _ranks(scores, dim) >= count


def _ranks(scores: Tensor, dim: int | None) -> Tensor:
    """Rank of each score, 0 for the smallest; equal scores by position."""
    if dim is not None:
        return scores.argsort(dim=dim, stable=True).argsort(dim=dim)
    flat = scores.flatten()
    ranks = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    ranks[flat.argsort(stable=True)] = torch.arange(len(flat), device=flat.device)
    return ranks.reshape(scores.shape)
