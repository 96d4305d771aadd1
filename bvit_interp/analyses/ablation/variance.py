"""Two-way analysis of variance over steps and units, cross-validated over images.

The sums of squares of a two-way ANOVA (steps by units, one mean effect per cell) hold the noise of
the images. Here each square is a sum of products of different folds of the images. Noise that is
independent from image to image then adds nothing in expectation, as in the cross-validated
distances of Walther et al. (2016, https://doi.org/10.1016/j.neuroimage.2015.12.012).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Float64, Int

from bvit_interp.metrics.statistics import jackknife_half_width

FOLDS = 10
KL_FLOOR = 1e-9
"""Nats. The rounding of float32 makes a KL of about this size."""
_ROUNDING = 1e-12  # relative to the largest effect


def fold_numbers(count: int) -> list[int]:
    """The fold 0..9 of each of `count` images in order.

    Images half the set apart, partners of each other in resample ablation, are in the same fold:
    their effects share noise. (Of an odd number of images the last one's partner may be in another
    fold.)
    """
    half = max(count // 2, 1)
    return [position % half % FOLDS for position in range(count)]


def log_kl(
    kl: Float[np.ndarray, "folds steps units"],
) -> Float[np.ndarray, "folds steps units"]:
    """Logarithm of the mean KL of each fold, nats; a mean KL below `KL_FLOOR` counts as that.

    nan, for a fold without images, stays nan.
    """
    return np.log(np.maximum(kl, KL_FLOOR))


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """P-values adjusted for the number of tests (Holm, 1979); nan is no test and stays nan.

    A test is significant at level a among all of them if its adjusted p-value is at most a.
    """
    order = np.argsort(p_values)  # nan comes last
    count = int(np.isfinite(p_values).sum())
    smallest = p_values[order[:count]] * np.arange(count, 0, -1)
    adjusted = np.full(len(p_values), math.nan)
    adjusted[order[:count]] = np.minimum(np.maximum.accumulate(smallest), 1.0)
    return adjusted


def cross_validated_anova(
    effects: Float[np.ndarray, "folds steps units"],
    counts: Int[np.ndarray, " folds"],
    seed: int = 0,
    draws: int = 2000,
) -> dict[str, dict[str, float]]:
    """Shares of variance of the step, of the unit and of their interaction, and their reliability.

    Parameters
    ----------
    effects : mean effect over the images of each fold.
    counts : number of images of each fold; folds without images are left out.
    seed : random seed for permutations.
    draws : number of permutations.

    Returns
    -------
    `variance_steps`, `variance_units`, `variance_interaction`: each has `value`; `null`, the share
    expected if units are shuffled within each step (`variance_steps`: steps within each unit);
    `low` and `high`, the 95 % interval of the delete-one-fold jackknife, if all ten folds have
    images. `reliability`: the correlation between even and odd folds of the differences between
    units at a step, as `value`; `null` is 0; `p_value` is by permutation of the units, in every
    fold anew but in the same way at all its steps, because an image's noise is shared by its steps.
    `reliability_interaction`: the same of what is left of these differences without their mean over
    the steps. It is above 0 if the differences between units change from step to step. nan where
    the estimate of the total variance is not positive, and where nothing varies.
    """
    present = counts > 0
    weighted = effects[present] * counts[present, None, None]
    steps, units = effects.shape[1:]
    shares = _shares(weighted)
    half = np.full(3, math.nan)
    if len(weighted) == FOLDS:
        without = [_shares(np.delete(weighted, fold, axis=0)) for fold in range(FOLDS)]
        half = jackknife_half_width(np.array(without))
    null_units = (1 - shares[0]) / steps
    nulls = ((1 - shares[1]) / units, null_units, 1 - shares[0] - null_units)
    table = {
        f"variance_{name}": {
            "value": shares[i],
            "low": shares[i] - half[i],
            "high": shares[i] + half[i],
            "null": nulls[i],
        }
        for i, name in enumerate(("steps", "units", "interaction"))
    }
    within = weighted - weighted.mean(-1, keepdims=True)
    changing = within - within.mean(-2, keepdims=True)
    for name, part in (("reliability", within), ("reliability_interaction", changing)):
        is_rounding = np.abs(part) <= _ROUNDING * np.abs(weighted).max(initial=0.0)
        value, p_value = _reliability(np.where(is_rounding, 0.0, part), seed, draws)
        table[name] = {"value": value, "null": 0.0, "p_value": p_value}
    return table


def _shares(weighted: Float[np.ndarray, "folds steps units"]) -> Float64[np.ndarray, " shares"]:
    """Shares of the steps, the units and the interaction."""
    grand = weighted.mean((-2, -1), keepdims=True)
    by_step = weighted.mean(-1, keepdims=True) - grand
    by_unit = weighted.mean(-2, keepdims=True) - grand
    interaction = weighted - grand - by_step - by_unit
    squares = np.array(
        [
            _cross_square(np.broadcast_to(part, weighted.shape))
            for part in (by_step, by_unit, interaction)
        ]
    )
    return squares / squares.sum() if squares.sum() > 0 else np.full(3, math.nan)


def _cross_square(values: Float[np.ndarray, "folds steps units"]) -> float:
    """Sum over cells of the products of different folds."""
    return float((values.sum(0) ** 2).sum() - (values**2).sum())


def _reliability(
    within: Float[np.ndarray, "folds steps units"], seed: int, draws: int
) -> tuple[float, float]:
    """Correlation of even and odd folds, and its p-value; the observed order counts as a draw."""
    folds, steps, units = within.shape
    if units < 2 or folds < 2:
        return math.nan, math.nan
    observed = float(_half_correlation(within))
    if math.isnan(observed):
        return math.nan, math.nan
    identity = np.tile(np.arange(units), (draws, folds, 1))
    orders = np.random.default_rng(seed).permuted(identity, axis=-1)
    at_all_steps = orders[:, :, None].repeat(steps, axis=2)
    permuted = _half_correlation(np.take_along_axis(within[None], at_all_steps, axis=-1))
    slack = 1e-9 * abs(observed)  # an order that changes only the rounding counts as equal
    return observed, float((1 + (permuted >= observed - slack).sum()) / (1 + draws))


def _half_correlation(
    within: Float[np.ndarray, "*draws folds steps units"],
) -> Float[np.ndarray, "*draws"]:
    """Correlations of the sums of even and of odd folds; nan where one of them is zero."""
    even, odd = within[..., ::2, :, :].sum(-3), within[..., 1::2, :, :].sum(-3)
    scale = np.asarray(np.sqrt((even**2).sum((-2, -1)) * (odd**2).sum((-2, -1))))
    products = (even * odd).sum((-2, -1))
    return np.divide(products, scale, out=np.full_like(scale, math.nan), where=scale > 0)
