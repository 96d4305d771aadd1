"""Intervals and permutation nulls of numbers over images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor


def mean_over_images(values: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
    """Mean over images, nan left out: of all of them, or of the means of the classes.

    Parameters
    ----------
    values : ``(n, ...)``, one row an image.
    classes : ``(n,)`` class of each image. Per column, the mean over the images present in each
        class, then over the classes that have any; without it the mean over images.

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
    """`mean_over_images` of bootstrap resamples of the images (Efron, 1979); their quantiles are
    the interval.

    Parameters
    ----------
    values : ``(n, columns)``, one row an image; nan is left out of its column's mean.
    classes : ``(n,)`` class of each image, for the mean of class means; a class that a resample
        misses is left out.
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
    for begin in range(
        0, draws, 100
    ):  # a block of resamples at a time bounds memory at 100 (n + columns)
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
    """Order that brings the images of a class together, and where each class begins in it; one
    class if none."""
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


def pairing_p_value(agreement: np.ndarray, seed: int = 0, draws: int = 5000) -> float:
    """Share of one-to-one pairings of rows with columns that agree as well as equal numbers do: the
    null that numbers mean nothing (Fisher's permutation test).

    Parameters
    ----------
    agreement : ``(H, H)``, of each row with each column.
    seed, draws : of the random pairings where there are too many to take all (H > 7); equal numbers
        count as a draw.

    Returns
    -------
    0..1, at least 1 / H!; nan for one row, or with nan in the table.
    """
    count = len(agreement)
    if count < 2 or np.isnan(agreement).any():
        return math.nan
    if count <= 7:
        columns = np.array(list(itertools.permutations(range(count))))
    else:
        shuffled = np.random.default_rng(seed).permuted(
            np.tile(np.arange(count), (draws, 1)), axis=1
        )
        columns = np.vstack([np.arange(count), shuffled])
    totals = agreement[np.arange(count), columns].sum(1)
    return float((totals >= np.trace(agreement) - 1e-12).mean())


def rank_trend(values: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row ``(..., columns)`` with the order of the columns,
    ``(...)`` in -1..1.

    nan is left out and ties share their mean rank; nan for a row of one value, or of fewer than
    three.
    """
    present = ~np.isnan(values)
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    tied = (values[..., None, :] == values[..., :, None]).sum(-1)
    count = present.sum(-1, keepdims=True)
    ranks, places = (
        np.where(present, r - (count - 1) / 2, 0.0)
        for r in (below + (tied - 1) / 2, present.cumsum(-1) - 1)
    )
    with np.errstate(invalid="ignore"):
        rho = (ranks * places).sum(-1) / np.sqrt((ranks**2).sum(-1) * (places**2).sum(-1))
    return np.where(count[..., 0] >= 3, rho, math.nan)


def shuffled_rows(values: np.ndarray, seed: int = 0, draws: int = 2000) -> np.ndarray:
    """`values` ``(rows, columns)``, each row in a random order of its own, ``(draws, rows,
    columns)``: the null of a trend over the columns. nan stays where it is."""
    rng = np.random.default_rng(seed)
    shuffled = np.repeat(values[None], draws, axis=0)
    for row, present in enumerate(~np.isnan(values)):
        shuffled[:, row, present] = rng.permuted(shuffled[:, row, present], axis=-1)
    return shuffled


def one_vs_rest(said: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Recall, precision and balanced accuracy of each class against all others.

    ``recall = TP / P``, ``precision = TP / (TP + FP)``, ``balanced accuracy = (TP / P + TN / N) /
    2``; an answer that does not look has a balanced accuracy of 1/2.

    Parameters
    ----------
    said, truth : bool ``(n, C)``: was the image said to be of the class, and is it.

    Returns ------- Three float64 ``(C,)``; precision is 0 for a class that was never said; recall
    is nan without an image of the class, balanced accuracy also without another image.
    """
    right = (said & truth).sum(0).double()
    recall = right / truth.sum(0)
    specificity = (~said & ~truth).sum(0).double() / (~truth).sum(0)
    precision = torch.where(said.any(0), right / said.sum(0), 0.0)
    return recall, precision, (recall + specificity) / 2
