"""Spectra: energy rank, participation ratio, spectral centroid, and what chance would give."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def energy_rank(singular_values: Tensor, energy: float = 0.95) -> Tensor:
    """Smallest k whose first k squared singular values hold `energy` of their sum.

    ``E_k = sum_{i<=k} s_i^2 / sum_i s_i^2``, ``r = min{k : E_k >= energy}`` (bViT, App. A.2).

    Parameters
    ----------
    singular_values : ``(..., K)``, in any order, not negative.
    energy : share of the energy to keep, in (0, 1].

    Returns
    -------
    int64 ``(...)``; 0 for a matrix of zeros.
    """
    squared = singular_values.double().square().sort(dim=-1, descending=True).values
    total = squared.sum(-1, keepdim=True)
    share = squared.cumsum(-1) / total
    # one part in 1e12 of slack: rounding must not add a rank when the share is met exactly
    rank = (share < energy * (1 - 1e-12)).sum(-1) + 1
    return torch.where(total.squeeze(-1) > 0, rank.clamp(max=squared.shape[-1]), 0)


def singular_values_of_gram(gram: Tensor) -> Tensor:
    """Singular values ``(..., D)`` of X, largest first, from X^T X ``(..., D, D)``."""
    return torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt().flip(-1)


def random_energy_rank(rows: int, columns: int, energy: float = 0.95, grid: int = 20_000) -> int:
    """Energy rank expected of a `rows` x `columns` matrix of independent Gaussian entries: the
    null.

    From the Marchenko-Pastur density of the eigenvalues of X^T X / rows (Marchenko & Pastur, 1967),
    integrated numerically. A 3072 x 768 matrix has 661.
    """
    tall, wide = max(rows, columns), min(rows, columns)
    ratio = wide / tall
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # eigenvalues low..high as 1 + ratio + 2 sqrt(ratio) cos(angle): no singular ends on a uniform
    # grid of angles
    angle = (np.arange(grid) + 0.5) * math.pi / grid  # from the largest eigenvalue down
    value = np.clip(1 + ratio + 2 * math.sqrt(ratio) * np.cos(angle), low, high)
    density = np.sin(angle) ** 2 / value
    mass, held = np.cumsum(density), np.cumsum(density * value)
    share = np.interp(energy, held / held[-1], mass / mass[-1])
    return min(max(math.ceil(share * wide), 1), wide)


def participation_ratio(centred: Tensor) -> Tensor:
    """``(sum_i l_i)^2 / sum_i l_i^2`` of the eigenvalues of ``(..., D, D)``: over how many
    directions points spread.

    k equal eigenvalues, the others 0, give k. From traces alone, no decomposition; nan for a matrix
    of zeros.
    """
    trace, square = (
        centred.double().diagonal(dim1=-2, dim2=-1).sum(-1),
        centred.double().square().sum((-2, -1)),
    )
    return torch.where(square > 0, trace.square() / square, torch.nan)


def random_participation_ratio(rows: int, columns: int) -> float:
    """The same expected of `rows` independent points of an isotropic Gaussian in `columns`
    dimensions: the null.

    ``(m D + 2) / (m + D + 1)`` with m = rows - 1 and D = columns, from the Wishart moments E[tr^2
    W] = m D (m D + 2) and E[tr W^2] = m D (m + D + 1); W / tr W is independent of tr W, so it is
    exactly 1 / E[1 / ratio].
    """
    m = rows - 1
    return (m * columns + 2) / (m + columns + 1) if m > 0 else math.nan


def spectral_centroid(images: Tensor) -> Tensor:
    """Mean spatial frequency of the grey image weighted by power: ``sum |k| |F(k)|^2 / sum
    |F(k)|^2``, k not 0.

    Parameters
    ----------
    images : ``(..., channels, height, width)``; grey is the mean over channels, its own mean is
        taken off.

    Returns
    -------
    float64 ``(...)``, cycles a pixel, 0 to 0.71; white noise has about 0.38, an image of one grey
    nan.
    """
    grey = images.double().mean(-3)
    grey = grey - grey.mean((-2, -1), keepdim=True)
    rows, columns = (
        torch.fft.fftfreq(n, device=images.device, dtype=torch.float64) for n in grey.shape[-2:]
    )
    radius = torch.hypot(rows[:, None], columns[None, :])
    power = torch.fft.fft2(grey).abs().square()
    total = power.sum((-2, -1))
    seen = total > (1e-10 * radius.numel()) ** 2  # contrast above rounding
    return torch.where(seen, (radius * power).sum((-2, -1)) / total, torch.nan)
