"""Shares of variance against the textbook, a loop over pairs of folds and all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import stats

from bvit_interp.analyses.ablation.variance import (
    FOLDS,
    cross_validated_anova,
    fold_numbers,
    holm,
    log_kl,
)


def same_in_all_folds(table):
    return np.repeat(np.asarray(table, float)[None], 10, axis=0), np.full(10, 7)


def test_shares_without_noise_are_those_of_the_textbook():
    table = np.random.default_rng(0).normal(size=(5, 3)) + np.arange(5)[:, None]
    found = cross_validated_anova(*same_in_all_folds(table))
    total = ((table - table.mean()) ** 2).sum()
    of_steps = 3 * ((table.mean(1) - table.mean()) ** 2).sum()
    of_units = 5 * ((table.mean(0) - table.mean()) ** 2).sum()
    both = sum(
        (table[t, u] - table[t].mean() - table[:, u].mean() + table.mean()) ** 2
        for t in range(5)
        for u in range(3)
    )
    for name, expected in (("steps", of_steps), ("units", of_units), ("interaction", both)):
        row = found[f"variance_{name}"]
        assert [row["value"], row["low"], row["high"]] == pytest.approx([expected / total] * 3)
    assert found["reliability"]["value"] == pytest.approx(1.0)


def test_nulls_are_means_over_all_shuffles():
    table = np.random.default_rng(1).normal(size=(3, 3)) + np.array([0.0, 1.0, 2.0])
    found = cross_validated_anova(*same_in_all_folds(table))
    orders = [list(order) for order in itertools.permutations(range(3))]
    shares = []
    for chosen in itertools.product(orders, repeat=3):
        shuffled = np.array([row[order] for row, order in zip(table, chosen, strict=True)])
        total = ((shuffled - shuffled.mean()) ** 2).sum()
        shares.append(3 * ((shuffled.mean(0) - shuffled.mean()) ** 2).sum() / total)
    units = found["variance_units"]
    assert units["null"] == pytest.approx(np.mean(shares))
    assert found["variance_interaction"]["null"] == pytest.approx(
        1 - found["variance_steps"]["value"] - units["null"]
    )
    across = cross_validated_anova(*same_in_all_folds(table.T))[
        "variance_units"
    ]  # steps within units are units within steps
    assert found["variance_steps"]["null"] == pytest.approx(across["null"])
    assert found["variance_steps"]["value"] == pytest.approx(across["value"])


def test_noise_of_images_is_no_interaction():
    rng, found = np.random.default_rng(2), []
    table = np.arange(6.0)[:, None] + np.array([0.0, 3.0, 1.0])  # steps and units add up
    for _ in range(60):
        folds = table + rng.normal(scale=3, size=(10, 6, 3))
        rows = cross_validated_anova(folds, np.full(10, 5), draws=1)
        found.append([rows[f"variance_{name}"]["value"] for name in ("units", "interaction")])
        noisy = folds.mean(0)
        rest = noisy - noisy.mean(0) - noisy.mean(1, keepdims=True) + noisy.mean()
        found[-1].append(rest.var() / noisy.var())
    units, both, plain = np.mean(found, axis=0)
    assert abs(both) < 0.05
    assert plain > 0.08
    expected = table.mean(0).var() / table.var()
    assert units == pytest.approx(expected, abs=0.05)


def test_reliability_is_the_correlation_of_the_halves():
    rng = np.random.default_rng(3)
    folds, counts = rng.normal(size=(10, 4, 3)) + rng.normal(size=(4, 3)), np.array([3, 2] * 5)
    row = cross_validated_anova(folds, counts)["reliability"]
    halves = [folds[k::2].mean(0) for k in range(2)]
    halves = [half - half.mean(1, keepdims=True) for half in halves]
    assert row["value"] == pytest.approx(np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1])
    assert row["null"] == 0
    alike = cross_validated_anova(*same_in_all_folds(rng.normal(size=(4, 3))))["reliability"]
    assert alike["p_value"] < 0.02


def test_few_images_one_unit_and_nothing_at_all():
    rng = np.random.default_rng(4)
    folds = np.full((10, 4, 3), np.nan)
    folds[:3] = rng.normal(size=(3, 4, 3))
    few = cross_validated_anova(folds, np.array([1, 1, 1] + [0] * 7))
    assert np.isnan(few["variance_units"]["low"])
    assert -1 <= few["reliability"]["value"] <= 1
    one_image = cross_validated_anova(folds[:1], np.array([1]))
    assert all(np.isnan(row["value"]) for row in one_image.values())
    one_unit = cross_validated_anova(*same_in_all_folds(np.arange(4.0)[:, None]))
    assert one_unit["variance_steps"]["value"] == 1
    assert np.isnan(one_unit["reliability"]["p_value"])
    nothing = cross_validated_anova(*same_in_all_folds(np.zeros((4, 3))))
    assert np.isnan(nothing["variance_interaction"]["value"])
    for name in ("reliability", "reliability_interaction"):
        assert np.isnan(nothing[name]["value"]) and np.isnan(nothing[name]["p_value"])


def test_noise_that_a_unit_has_at_all_steps_is_not_reliable():
    rng, below = np.random.default_rng(5), 0
    for seed in range(200):  # no unit differs; half the noise of a fold is the unit's at every step
        folds = rng.normal(size=(10, 12, 4)) + rng.normal(size=(10, 1, 4))
        below += (
            cross_validated_anova(folds, np.full(10, 8), seed, draws=99)["reliability"]["p_value"]
            <= 0.05
        )
    assert below <= 22  # 10 are expected, 22 are four standard deviations more
    folds += np.array([0.0, 1.0, 2.0, 3.0])
    assert cross_validated_anova(folds, np.full(10, 8), draws=99)["reliability"][
        "p_value"
    ] == pytest.approx(0.01)


def textbook_shares(folds, counts):
    """Shares of steps, units and interaction by loops over pairs of different folds."""
    squares = np.zeros(3)
    for a, b in itertools.permutations(range(len(folds)), 2):
        parts = []
        for fold in (a, b):
            table = folds[fold] * counts[fold]
            by_step = table.mean(1)[:, None] - table.mean() + np.zeros_like(table)
            by_unit = table.mean(0)[None] - table.mean() + np.zeros_like(table)
            parts.append([by_step, by_unit, table - table.mean() - by_step - by_unit])
        squares += [(left * right).sum() for left, right in zip(*parts, strict=True)]
    return squares / squares.sum()


def test_intervals_are_a_jackknife_over_the_folds():
    """Tukey's pseudo-values: the interval is that of a mean of ten numbers by Student's t."""
    rng = np.random.default_rng(6)
    counts = rng.integers(3, 8, 10)
    folds = rng.normal(size=(10, 4, 3)) + rng.normal(scale=2, size=(4, 3))
    table = cross_validated_anova(folds, counts)
    whole = textbook_shares(folds, counts)
    without = np.array(
        [textbook_shares(np.delete(folds, k, 0), np.delete(counts, k)) for k in range(10)]
    )
    pseudo = 10 * whole - 9 * without
    for i, name in enumerate(("steps", "units", "interaction")):
        row = table[f"variance_{name}"]
        assert row["value"] == pytest.approx(whole[i])
        test = stats.ttest_1samp(pseudo[:, i], 0.0).confidence_interval(0.95)
        assert row["high"] - row["low"] == pytest.approx(test.high - test.low)
        assert (row["high"] + row["low"]) / 2 == pytest.approx(row["value"])


def test_the_p_value_counts_permutations_that_correlate_as_much():
    """Two units: a permutation swaps them in each fold or not; all 1024 of them, by hand."""
    rng = np.random.default_rng(7)
    folds = rng.normal(size=(10, 3, 2)) + np.array([0.0, 0.7])
    row = cross_validated_anova(folds, np.full(10, 4), seed=1, draws=20_000)["reliability"]
    within = (folds[..., 0] - folds[..., 1]) / 2

    def correlation(signs):
        even, odd = ((within * signs[:, None])[first::2].sum(0) for first in (0, 1))
        return even @ odd / np.sqrt((even @ even) * (odd @ odd))

    every = [correlation(np.array(signs)) for signs in itertools.product((1, -1), repeat=10)]
    assert row["value"] == pytest.approx(correlation(np.ones(10)))
    expected = np.mean(np.array(every) >= row["value"] - 1e-9)
    assert 0.002 < expected < 0.5
    assert row["p_value"] == pytest.approx(expected, abs=4 * np.sqrt(expected / 20_000))


def test_the_observed_order_counts_as_one_permutation():
    folds = np.random.default_rng(8).normal(size=(10, 3, 4)) + np.arange(4.0) * 5
    row = cross_validated_anova(folds, np.full(10, 3), draws=19)["reliability"]
    assert row["p_value"] == pytest.approx(1 / 20)


def test_images_half_the_set_apart_share_a_fold():
    for count in (2, 6, 16, 20, 74):
        folds = fold_numbers(count)
        assert folds[: count // 2] == folds[count // 2 :]
    assert fold_numbers(26) == [*range(10), 0, 1, 2] * 2
    assert fold_numbers(1) == [0]
    assert np.bincount(fold_numbers(80)).tolist() == [8] * FOLDS


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        cross_validated_anova(np.zeros((10, 4)), np.full(10, 1))
    with pytest.raises(TypeCheckError):
        cross_validated_anova(np.zeros((10, 4, 3)), np.full(9, 1))


def test_small_effects_have_the_same_shares():
    folds = np.random.default_rng(9).normal(size=(10, 4, 3)) + np.arange(3.0)
    whole, small = (
        cross_validated_anova(scale * folds, np.full(10, 2), draws=50) for scale in (1.0, 1e-5)
    )
    for name, row in whole.items():
        assert small[name] == pytest.approx(row)


def test_reliability_of_the_interaction_is_that_of_the_residuals():
    rng = np.random.default_rng(10)
    folds = rng.normal(size=(10, 4, 3)) + 2 * rng.normal(size=(4, 3)) + 5 * rng.normal(size=3)
    row = cross_validated_anova(folds, np.full(10, 3))["reliability_interaction"]
    halves = [folds[k::2].mean(0) for k in range(2)]
    residuals = [
        [
            half[t, u] - half[t].mean() - half[:, u].mean() + half.mean()
            for t in range(4)
            for u in range(3)
        ]
        for half in halves
    ]
    assert row["value"] == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert row["null"] == 0


def test_units_in_the_same_order_at_all_steps_are_reliable_without_interaction():
    """Units differ alike at every step: only noise is left, or rounding."""
    rng, below = np.random.default_rng(11), 0
    table = np.arange(6.0)[:, None] + 10 * np.arange(4.0) / 3
    for seed in range(200):
        folds = table + rng.normal(size=(10, 6, 4)) + rng.normal(size=(10, 1, 4))
        rows = cross_validated_anova(folds, np.full(10, 8), seed, draws=99)
        assert rows["reliability"]["p_value"] <= 0.05
        below += rows["reliability_interaction"]["p_value"] <= 0.05
    assert below <= 22  # 10 are expected, 22 are four standard deviations more
    exact = cross_validated_anova(*same_in_all_folds(table))
    assert exact["reliability"]["value"] == pytest.approx(1)
    assert np.isnan(exact["reliability_interaction"]["value"])  # rounding is no interaction
    turned = folds + np.where(np.arange(6)[:, None] < 3, 1, -1) * np.arange(4.0)
    rows = cross_validated_anova(turned, np.full(10, 8), draws=99)
    assert rows["reliability_interaction"]["p_value"] == pytest.approx(0.01)


def test_effects_in_proportion_interact_but_not_on_the_logarithm():
    """Steps by factors up to 100, units by factors: the product is a sum of logarithms."""
    kl = 10.0 ** -np.arange(3)[:, None] * np.array([1.0, 2.0, 4.0])
    raw, log = (
        cross_validated_anova(*same_in_all_folds(values))
        for values in (kl, log_kl(np.repeat(kl[None], 10, axis=0))[0])
    )
    assert raw["variance_interaction"]["value"] > 0.05
    assert raw["reliability_interaction"]["value"] == pytest.approx(1)
    assert log["variance_interaction"]["value"] == pytest.approx(0, abs=1e-9)
    steps, units = 2 / 3 * np.log(10) ** 2, 2 / 3 * np.log(2) ** 2
    assert log["variance_steps"]["value"] == pytest.approx(steps / (steps + units))
    assert log["variance_units"]["value"] == pytest.approx(units / (steps + units))


def test_a_small_kl_counts_as_the_floor():
    kl = np.array([[[0.0, 1e-9, -1e-15], [1.0, np.e, 1e-8]], np.full((2, 3), np.nan)])
    low = np.log(1e-9)
    expected = [[low, low, low], [0.0, 1.0, np.log(1e-8)]]
    np.testing.assert_allclose(log_kl(kl)[0], expected, atol=1e-12)
    assert np.isnan(log_kl(kl)[1]).all()


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1; no less than the one before, at most 1."""
    found = holm(np.array([0.03, np.nan, 0.01, 0.04, 0.02]))
    np.testing.assert_allclose(found, [0.06, np.nan, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.6])), [1.0, 1.0])
    np.testing.assert_allclose(holm(np.array([0.02])), [0.02])
    assert np.isnan(holm(np.array([np.nan]))).all()
    assert holm(np.array([])).shape == (0,)
