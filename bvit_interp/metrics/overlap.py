"""Binary masks compared: overlap, specialization, utilisation, and what independent masks would
give."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def jaccard(masks: Tensor) -> Tensor:
    """``|M_i and M_j| / |M_i or M_j|`` (bViT, eq. 11) of every two: ``(K, K)`` float64; nan for two
    empty masks."""
    sizes, rows = masks.sum(1).double(), masks.float()
    both = (rows @ rows.mT).double()  # counts, exact in float32 below 2^24
    return both / (sizes[:, None] + sizes - both)


def specialization(masks: Tensor) -> Tensor:
    """``1 - |M_t and U| / |M_t|``, U the union of the other masks (bViT, eq. 12): ``(K,)`` float64;
    nan if empty."""
    alone = masks & (masks.sum(0) == 1)
    return alone.sum(1).double() / masks.sum(1)


def utilisation(masks: Tensor) -> Tensor:
    """How many weights are active in exactly 0, 1, ... K masks: ``(K + 1,)`` int64."""
    return torch.bincount(masks.sum(0), minlength=len(masks) + 1)


def independent_jaccard(density: Tensor) -> Tensor:
    """The first, for i not j, if masks of densities q ``(K,)`` are independent: ``q_i q_j / (q_i +
    q_j - q_i q_j)``."""
    both = density[:, None] * density
    return both / (density[:, None] + density - both)


def independent_specialization(density: Tensor) -> Tensor:
    """The second under independence, ``prod_{s not t} (1 - q_s)``: it rises with sparsity though
    nothing is learned."""
    return (1 - density).expand(len(density), -1).clone().fill_diagonal_(1).prod(1)


def independent_utilisation(density: Tensor) -> Tensor:
    """The third under independence, as probabilities of a weight ``(K + 1,)``: the Poisson-binomial
    distribution."""
    found = density.new_ones(1)
    for q in density:
        found = F.pad(found, (0, 1)) * (1 - q) + F.pad(found, (1, 0)) * q
    return found
