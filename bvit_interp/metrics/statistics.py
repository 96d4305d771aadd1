"""Confidence intervals and permutation nulls for numbers per image."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Shaped
from scipy import stats
from torch import Tensor

Z_95 = float(stats.norm.ppf(0.975))
"""Quantile of the standard normal distribution that bounds a two-sided 95 % interval."""


def t_95(degrees: int) -> float:
    """Quantile of Student's t for a two-sided 95 % interval, with `degrees` degrees of freedom."""
    return float(stats.t.ppf(0.975, degrees))


def mean_over_images(
    values: Float[np.ndarray, " images *shape"],
    classes: Shaped[np.ndarray, " images"] | None = None,
) -> Float[np.ndarray, "*shape"]:
    """Mean over images, or over the means of the classes; nan is left out.

    Parameters
    ----------
    values : one row per image.
    classes : class of each image. Per column, the mean over the images of each class, then over
        the classes that have any. By default the mean over all images.

    Returns
    -------
    nan where no image has a number.
    """
    order, begins = _by_class(len(values), classes)
    present = ~np.isnan(values[order])
    with np.errstate(invalid="ignore"):
        totals = np.add.reduceat(np.where(present, values[order], 0.0), begins)
        means = totals / np.add.reduceat(present, begins, dtype=np.int64)
        has_mean = ~np.isnan(means)
        return np.asarray(np.where(has_mean, means, 0.0).sum(0) / has_mean.sum(0))


def bootstrap_means(
    values: Float[np.ndarray, "images columns"],
    classes: Shaped[np.ndarray, " images"] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> Float64[np.ndarray, "draws columns"]:
    """`mean_over_images` of bootstrap resamples of the images (Efron, 1979).

    Quantiles over the draws are a confidence interval; see `interval`.

    Parameters
    ----------
    values : one row per image; nan is left out of its column's mean.
    classes : class of each image, for the mean of class means; a class that a resample misses is
        left out.
    seed : random seed for the resampling.
    draws : number of resamples.

    Returns
    -------
    nan where a resample leaves a column without images.
    """
    n, columns = values.shape
    means = np.full((draws, columns), np.nan)
    if n == 0:
        return means
    rng = np.random.default_rng(seed)
    order, begins = _by_class(n, classes)
    present = (~np.isnan(values[order])).astype(np.float64)
    filled = np.where(present > 0, values[order], 0.0)
    for begin in range(0, draws, 100):  # blocks bound the memory at 100 (n + columns) numbers
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


def interval(draws: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """95 % percentile interval of bootstrap draws; nan if none of them is a number."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion `hits / n` (Wilson, 1927); nan for n = 0.

    Parameters
    ----------
    hits : 0..n. It need not be a whole number, because ties count by expectation; scipy's
        `proportion_ci` does not allow that.
    n : number of trials.
    """
    if n == 0:
        return math.nan, math.nan
    square, share = Z_95**2, hits / n
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z_95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def jackknife_half_width(
    without: Float[np.ndarray, " groups *shape"],
) -> Float[np.ndarray, "*shape"]:
    """Half the width of a 95 % confidence interval, by the delete-one-group jackknife.

    ``t_{F-1} sqrt((F - 1) / F sum_f (m_f - mean m)^2)`` (Quenouille, 1949; Tukey, 1958), with m_f
    the measure without group f.

    Parameters
    ----------
    without : the measure with each of F groups left out.
    """
    groups = len(without)
    return np.asarray(t_95(groups - 1) * np.sqrt((groups - 1) * without.var(0)))


def pairing_p_value(
    agreement: Float[np.ndarray, "count count"], seed: int = 0, draws: int = 5000
) -> float:
    """Share of pairings of rows with columns that agree at least as well as row i with column i.

    The null is that the numbers of rows and columns mean nothing (Fisher's permutation test).

    Parameters
    ----------
    agreement : agreement of each row with each column.
    seed : random seed for pairings.
    draws : number of random pairings; if there are no more than that, all pairings are used. The
        observed pairing counts as one of them.

    Returns
    -------
    0..1; nan for one row, or with nan in the table.
    """
    count = len(agreement)
    if count < 2 or np.isnan(agreement).any():
        return math.nan

    def total(columns: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(agreement[np.arange(count), columns.astype(int)].sum(axis))

    found = stats.permutation_test(
        (np.arange(count),),
        total,
        permutation_type="pairings",
        vectorized=True,
        alternative="greater",
        n_resamples=draws if math.factorial(count) > draws else np.inf,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def rank_trend(values: Float[np.ndarray, "*rows columns"]) -> Float[np.ndarray, "*rows"]:
    """Spearman's correlation of each row with the order of its columns, -1..1.

    nan is left out and ties share their mean rank. The result is nan for a row whose values are
    equal, or that has fewer than three.
    """
    present = ~np.isnan(values)
    order = np.where(present, np.arange(values.shape[-1], dtype=float), np.nan)
    ranks, places = (stats.rankdata(each, axis=-1, nan_policy="omit") for each in (values, order))
    count = present.sum(-1, keepdims=True)
    ranks, places = (np.where(present, r - (count + 1) / 2, 0.0) for r in (ranks, places))
    with np.errstate(invalid="ignore"):
        rho = (ranks * places).sum(-1) / np.sqrt((ranks**2).sum(-1) * (places**2).sum(-1))
    return np.where(count[..., 0] >= 3, rho, math.nan)


def shuffled_rows(
    values: Float[np.ndarray, "rows columns"], seed: int = 0, draws: int = 2000
) -> Float[np.ndarray, "draws rows columns"]:
    """Each row shuffled on its own, `draws` times: the null of a trend over the columns.

    nan stays where it is.
    """
    rng = np.random.default_rng(seed)
    shuffled = np.repeat(values[None], draws, axis=0)
    for row, present in enumerate(~np.isnan(values)):
        shuffled[:, row, present] = rng.permuted(shuffled[:, row, present], axis=-1)
    return shuffled


def one_vs_rest(
    predicted: Bool[Tensor, "images classes"], truth: Bool[Tensor, "images classes"]
) -> tuple[Float[Tensor, " classes"], Float[Tensor, " classes"], Float[Tensor, " classes"]]:
    """Recall, precision and balanced accuracy of each class against all others.

    ``recall = TP / P``, ``precision = TP / (TP + FP)``, ``balanced accuracy = (TP / P + TN / N) /
    2``. A prediction that does not depend on the image has a balanced accuracy of 1/2. torchmetrics
    has the same measures in float32, and a recall of 0 where it is not defined.

    Parameters
    ----------
    predicted : whether each image is predicted to be of each class.
    truth : whether it is.

    Returns
    -------
    recall : float64; nan for a class without images.
    precision : float64; 0 for a class that is never predicted.
    balanced_accuracy : float64; nan for a class without images or without other images.
    """
    hits = (predicted & truth).sum(0).double()
    recall = hits / truth.sum(0)
    specificity = (~predicted & ~truth).sum(0).double() / (~truth).sum(0)
    precision = torch.where(predicted.any(0), hits / predicted.sum(0), 0.0)
    return recall, precision, (recall + specificity) / 2


def _by_class(n: int, classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Order that brings the images of a class together, and where each class begins in it."""
    if classes is None:
        return np.arange(n), np.zeros(min(n, 1), dtype=np.intp)
    order = np.argsort(classes, kind="stable")
    return order, np.unique(classes[order], return_index=True)[1]
