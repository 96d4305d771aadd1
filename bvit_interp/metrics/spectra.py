"""Energy rank, participation ratio and spectral centroid, with their nulls."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def energy_rank(
    singular_values: Float[Tensor, "*batch values"], energy: float = 0.95
) -> Int[Tensor, "*batch"]:
    """Smallest k whose k largest squared singular values hold `energy` of their sum.

    ``E_k = sum_{i<=k} s_i^2 / sum_i s_i^2``, ``r = min{k : E_k >= energy}`` (bViT, App. A.2).

    Parameters
    ----------
    singular_values : in any order, not negative.
    energy : share of the energy to keep, in (0, 1].

    Returns
    -------
    int64; 0 for a matrix of zeros.
    """
    squared = singular_values.double().square().sort(dim=-1, descending=True).values
    total = squared.sum(-1, keepdim=True)
    share = squared.cumsum(-1) / total
    # one part in 1e12 of slack: rounding must not add a rank when the share is met exactly
    rank = (share < energy * (1 - 1e-12)).sum(-1) + 1
    return torch.where(total.squeeze(-1) > 0, rank.clamp(max=squared.shape[-1]), 0)


def singular_values_of_gram(gram: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d"]:
    """Singular values of X in float64, largest first, from X^T X."""
    return torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt().flip(-1)


def random_energy_rank(rows: int, columns: int, energy: float = 0.95, grid: int = 20_000) -> int:
    """Null of `energy_rank`: its value for a matrix of independent Gaussian entries.

    The Marchenko-Pastur density of the eigenvalues of X^T X / rows (Marchenko & Pastur, 1967) is
    integrated numerically. A 3072 x 768 matrix has rank 661.

    Parameters
    ----------
    rows, columns : shape of the matrix.
    energy : as in `energy_rank`.
    grid : number of points of the integral.
    """
    tall, wide = max(rows, columns), min(rows, columns)
    ratio = wide / tall
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # on a uniform grid of angles, with eigenvalue = 1 + ratio + 2 sqrt(ratio) cos(angle), the
    # density has no singular ends
    angle = (np.arange(grid) + 0.5) * math.pi / grid  # from the largest eigenvalue down
    value = np.clip(1 + ratio + 2 * math.sqrt(ratio) * np.cos(angle), low, high)
    density = np.sin(angle) ** 2 / value
    mass, held = np.cumsum(density), np.cumsum(density * value)
    share = np.interp(energy, held / held[-1], mass / mass[-1])
    return min(max(math.ceil(share * wide), 1), wide)


def participation_ratio(covariance: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
    """Number of directions over which points spread, ``(sum_i l_i)^2 / sum_i l_i^2``.

    k equal eigenvalues l_i, with the others 0, give k. It is computed from traces, without a
    decomposition.

    Parameters
    ----------
    covariance : second moments about the mean, in any scale.

    Returns
    -------
    float64; nan for a matrix of zeros.
    """
    trace = covariance.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    square = covariance.double().square().sum((-2, -1))
    return torch.where(square > 0, trace.square() / square, torch.nan)


def random_participation_ratio(rows: int, columns: int) -> float:
    """Null of `participation_ratio`: its value for points of an isotropic Gaussian.

    ``(m D + 2) / (m + D + 1)`` with m = rows - 1 and D = columns, from the Wishart moments E[tr^2
    W] = m D (m D + 2) and E[tr W^2] = m D (m + D + 1). W / tr W is independent of tr W, so this is
    exactly 1 / E[1 / ratio].

    Parameters
    ----------
    rows, columns : number of points and of dimensions.

    Returns
    -------
    nan for fewer than two points.
    """
    m = rows - 1
    return (m * columns + 2) / (m + columns + 1) if m > 0 else math.nan


def spectral_centroid(
    images: Float[Tensor, "*batch channels height width"],
) -> Float[Tensor, "*batch"]:
    """Mean spatial frequency of the grey image, weighted by power.

    ``sum |k| |F(k)|^2 / sum |F(k)|^2`` over all k but 0.

    Parameters
    ----------
    images : grey is the mean over channels, minus its own mean.

    Returns
    -------
    float64, in cycles per pixel, 0 to 0.71. White noise has about 0.38; an image of a single grey
    gives nan.
    """
    grey = images.double().mean(-3)
    grey = grey - grey.mean((-2, -1), keepdim=True)
    rows, columns = (
        torch.fft.fftfreq(n, device=images.device, dtype=torch.float64) for n in grey.shape[-2:]
    )
    radius = torch.hypot(rows[:, None], columns[None, :])
    power = torch.fft.fft2(grey).abs().square()
    total = power.sum((-2, -1))
    has_contrast = total > (1e-10 * radius.numel()) ** 2  # above rounding error
    return torch.where(has_contrast, (radius * power).sum((-2, -1)) / total, torch.nan)
