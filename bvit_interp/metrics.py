"""Pure measures: tensors in, tensors out.

Shapes: B images, T steps, H heads, P patches; `...` are any leading axes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- rank ----------------------------------------------------------------------------------------------


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
    """Energy rank expected of a `rows` x `columns` matrix of independent Gaussian entries: the null.

    From the Marchenko-Pastur density of the eigenvalues of X^T X / rows (Marchenko & Pastur, 1967), integrated
    numerically. A 3072 x 768 matrix has 661.
    """
    tall, wide = max(rows, columns), min(rows, columns)
    ratio = wide / tall
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # eigenvalues low..high as 1 + ratio + 2 sqrt(ratio) cos(angle): no singular ends on a uniform grid of angles
    angle = (np.arange(grid) + 0.5) * math.pi / grid  # from the largest eigenvalue down
    value = np.clip(1 + ratio + 2 * math.sqrt(ratio) * np.cos(angle), low, high)
    density = np.sin(angle) ** 2 / value
    mass, held = np.cumsum(density), np.cumsum(density * value)
    share = np.interp(energy, held / held[-1], mass / mass[-1])
    return min(max(math.ceil(share * wide), 1), wide)


# ---- pointing ------------------------------------------------------------------------------------------


def at_patch_centres(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Value of each patch's centre pixel: mask ``(B, rows * p, cols * q)`` -> ``(B, rows * cols)``.

    The centre of patch (r, c) is pixel (p r + p // 2, q c + q // 2); for 16-px patches (16 r + 8, 16 c + 8).
    """
    (rows, cols), (height, width) = grid, mask.shape[-2:]
    p, q = height // rows, width // cols
    return mask[..., p // 2 :: p, q // 2 :: q][..., :rows, :cols].flatten(-2)


def near(positive: Tensor, tolerance: float) -> Tensor:
    """Pixels closer than `tolerance` px to a positive one (strictly, as TorchRay); the same mask for 0.

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

    Ties share the point: the hit is the fraction of the tied patches that are positive (the expected value of
    a fair choice). A map whose every maximum lies on ignored ground has no hit: nan.

    Parameters
    ----------
    maps : saliency of the patches ``(B, ..., P)``; only its maximum counts.
    positive : bool ``(B, P)``, patches whose point is on the object.
    ignored : bool ``(B, P)``, patches whose point is on ignored ground.

    Returns
    -------
    ``(B, ...)`` float64 in 0..1 or nan (Zhang et al., ECCV 2016, with the expectation over ties as ours).
    """
    tied = maps == maps.amax(-1, keepdim=True)
    between = (slice(None), *[None] * (maps.ndim - 2), slice(None))
    counted = (tied & ~ignored[between]).sum(-1).double()
    hits = (tied & (positive & ~ignored)[between]).sum(-1).double()
    return torch.where(counted > 0, hits / counted, torch.nan)


# ---- intervals -----------------------------------------------------------------------------------------


def mean_over_images(values: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
    """Mean over images, nan left out: of all of them, or of the means of the classes.

    Parameters
    ----------
    values : ``(n, ...)``, one row an image.
    classes : ``(n,)`` class of each image. Per column, the mean over the images present in each class, then over
        the classes that have any; without it the mean over images.

    Returns
    -------
    ``(...)``; nan where no image is present.
    """
    order, begins = _by_class(len(values), classes)
    present = ~np.isnan(values[order])
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(np.where(present, values[order], 0.0), begins) / np.add.reduceat(
            present, begins, dtype=np.int64
        )
        there = ~np.isnan(means)
        return np.where(there, means, 0.0).sum(0) / there.sum(0)


def bootstrap_means(
    values: np.ndarray, classes: np.ndarray | None = None, seed: int = 0, draws: int = 2000
) -> np.ndarray:
    """`mean_over_images` of bootstrap resamples of the images (Efron, 1979); their quantiles are the interval.

    Parameters
    ----------
    values : ``(n, columns)``, one row an image; nan is left out of its column's mean.
    classes : ``(n,)`` class of each image, for the mean of class means; a class that a resample misses is left out.
    seed, draws : of the resampling.

    Returns
    -------
    ``(draws, columns)``; nan where a resample leaves a column without images.
    """
    n, columns = values.shape
    means = np.full((draws, columns), np.nan)
    if n == 0:
        return means
    rng = np.random.default_rng(seed)
    order, begins = _by_class(n, classes)
    present = (~np.isnan(values[order])).astype(np.float64)
    filled = np.where(present > 0, values[order], 0.0)
    for begin in range(0, draws, 100):  # a block of resamples at a time bounds memory at 100 (n + columns)
        size = min(100, draws - begin)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size)[:, order].astype(np.float64)
        total, classes_there = np.zeros((size, columns)), np.zeros((size, columns))
        for first, end in zip(begins, [*begins[1:], n], strict=True):
            images = counts[:, first:end] @ present[first:end]
            total += (counts[:, first:end] @ filled[first:end]) / np.maximum(images, 1)
            classes_there += images > 0
        with np.errstate(invalid="ignore"):
            means[begin : begin + size] = total / classes_there
    return means


def _by_class(n: int, classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Order that brings the images of a class together, and where each class begins in it; one class if none."""
    if classes is None:
        return np.arange(n), np.zeros(min(n, 1), dtype=np.intp)
    order = np.argsort(classes, kind="stable")
    return order, np.unique(classes[order], return_index=True)[1]


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap draws ``(draws,)``; nan if none is a number."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion `hits / n` (Wilson, 1927)."""
    if n == 0:
        return math.nan, math.nan
    z, share = 1.959963984540054, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
