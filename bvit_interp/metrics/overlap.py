"""Overlap, specialization and utilisation of binary masks, with independent-mask nulls.

Section 4.2.3 of bViT (arXiv 2605.10661). The nulls are expectations over masks of the same
densities whose weights are drawn independently.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def jaccard(masks: Bool[Tensor, "masks weights"]) -> Float[Tensor, "masks masks"]:
    """``|M_i and M_j| / |M_i or M_j|`` of every pair of masks (bViT, eq. 11), float64.

    nan for two empty masks.
    """
    sizes, rows = masks.sum(1).double(), masks.float()
    both = (rows @ rows.mT).double()  # counts, exact in float32 below 2^24
    return both / (sizes[:, None] + sizes - both)


def specialization(masks: Bool[Tensor, "masks weights"]) -> Float[Tensor, " masks"]:
    """``1 - |M_t and U| / |M_t|``, U the union of the other masks (bViT, eq. 12), float64.

    nan for an empty mask.
    """
    exclusive = masks & (masks.sum(0) == 1)
    return exclusive.sum(1).double() / masks.sum(1)


def utilisation(masks: Bool[Tensor, "masks weights"]) -> Int[Tensor, " masks+1"]:
    """How many weights are active in exactly 0, 1, ... K of K masks."""
    return torch.bincount(masks.sum(0), minlength=len(masks) + 1)


def independent_jaccard(density: Float[Tensor, " masks"]) -> Float[Tensor, "masks masks"]:
    """`jaccard` of independent masks of densities q: ``q_i q_j / (q_i + q_j - q_i q_j)``.

    The diagonal has no meaning.
    """
    both = density[:, None] * density
    return both / (density[:, None] + density - both)


def independent_specialization(density: Float[Tensor, " masks"]) -> Float[Tensor, " masks"]:
    """`specialization` of independent masks of densities q: ``prod_{s not t} (1 - q_s)``.

    It rises with sparsity although nothing is learned.
    """
    return (1 - density).expand(len(density), -1).clone().fill_diagonal_(1).prod(1)


def independent_utilisation(density: Float[Tensor, " masks"]) -> Float[Tensor, " masks+1"]:
    """Probability that a weight is active in exactly 0, 1, ... K of K independent masks.

    This is the Poisson-binomial distribution of the densities.
    """
    distribution = density.new_ones(1)
    for q in density:
        distribution = F.pad(distribution, (0, 1)) * (1 - q) + F.pad(distribution, (1, 0)) * q
    return distribution
