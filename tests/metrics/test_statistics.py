"""Intervals and permutation nulls, against values worked out by hand or computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bvit_interp import metrics

nan = math.nan


class Counted:
    """A generator whose resamples are written down."""

    def __init__(self, counts):
        self.counts = counts

    def multinomial(self, n, shares, size):
        np.testing.assert_allclose(shares, 1 / n)
        assert size == len(self.counts)
        return np.array(self.counts)


def test_bootstrap_is_seeded():
    values = np.random.default_rng(0).random((30, 3))
    first = metrics.bootstrap_means(values, seed=5, draws=250)
    assert first.shape == (250, 3)
    assert np.isfinite(first).all()
    assert np.array_equal(first, metrics.bootstrap_means(values, seed=5, draws=250))
    assert not np.array_equal(first, metrics.bootstrap_means(values, seed=6, draws=250))


def test_bootstrap_leaves_the_global_generator_and_its_input_alone():
    values = np.array([[1.0, nan], [2.0, 3.0]])
    before, state = values.copy(), np.random.get_state()[1].copy()  # noqa: NPY002
    classes = np.array([1, 0])
    metrics.bootstrap_means(values, classes)
    metrics.mean_over_images(values, classes)
    assert np.array_equal(values, before, equal_nan=True)
    assert classes.tolist() == [1, 0]
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_bootstrap_of_written_down_resamples(monkeypatch):
    monkeypatch.setattr(
        np.random, "default_rng", lambda seed: Counted([[3, 0, 0], [1, 1, 1], [0, 2, 1], [0, 3, 0]])
    )
    values = np.array([[1.0, 5.0], [4.0, nan], [7.0, 2.0]])
    found = metrics.bootstrap_means(values, draws=4)
    np.testing.assert_allclose(found, [[1, 5], [4, 3.5], [5, 2], [4, nan]])
    found = metrics.bootstrap_means(values, np.array([7, 3, 7]), draws=4)
    # classes {4} and {1, 7}; {nan} and {5, 2}: a class a resample misses, or with nothing but nan,
    # is left out
    np.testing.assert_allclose(found, [[1, 5], [(4 + 4) / 2, 3.5], [(4 + 7) / 2, 2], [4, nan]])


def test_bootstrap_against_scipy():
    values = np.random.default_rng(1).exponential(size=(60, 1))
    draws = metrics.bootstrap_means(values, seed=0, draws=4000)[:, 0]
    theirs = stats.bootstrap((values[:, 0],), np.mean, n_resamples=4000, method="percentile", rng=1)
    # of the plug-in distribution, exact for the bootstrap of a mean
    error = values.std() / math.sqrt(60)
    assert abs(draws.mean() - values.mean()) < 4 * error / math.sqrt(4000)
    assert draws.std() == pytest.approx(error, rel=0.05)
    assert metrics.interval(draws) == pytest.approx(
        tuple(theirs.confidence_interval), abs=0.15 * error
    )


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        low, high = metrics.interval(
            metrics.bootstrap_means(rng.normal(size=(80, 1)), seed=trial, draws=400)[:, 0]
        )
        covered += low <= 0 <= high
    # the percentile interval is a little short at n = 80
    assert covered >= stats.binom.ppf(0.001, 200, 0.93)
    assert covered <= stats.binom.ppf(0.999, 200, 0.96)


def test_mean_over_images_by_hand():
    values, classes = np.array([1, nan, 0, 0, 0])[:, None], np.array([0, 0, 0, 1, 1])
    assert metrics.mean_over_images(values) == [0.25]
    assert metrics.mean_over_images(values, classes) == [0.25]  # (1 / 2 + 0) / 2
    values = np.array([[1, nan], [nan, nan], [0, 1], [0.4, nan], [0.8, nan]])
    order = [3, 0, 4, 2, 1]  # classes need not be sorted
    found = metrics.mean_over_images(values[order], np.array([5, 2, 5, 2, 2]))
    np.testing.assert_allclose(found, [(0.5 + 0.6) / 2, 1])  # a class without a number is left out
    np.testing.assert_allclose(metrics.mean_over_images(values), [2.2 / 4, 1])


@pytest.mark.parametrize("classes", [None, np.array([0, 1, 0, 1])])
def test_mean_over_images_keeps_the_other_axes(classes):
    values = np.random.default_rng(0).random((4, 3, 2))
    # balanced classes
    np.testing.assert_allclose(metrics.mean_over_images(values, classes), values.mean(0))
    values[:, 1] = nan
    found = metrics.mean_over_images(values, classes)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()
    none = metrics.mean_over_images(values[:0], None if classes is None else classes[:0])
    assert none.shape == (3, 2)
    assert np.isnan(none).all()


def test_bootstrap_by_class_with_gaps_is_the_mean_of_every_resample(monkeypatch):
    rng = np.random.default_rng(4)
    values, classes = rng.random((12, 5)), rng.integers(0, 4, 12)
    values[rng.random(values.shape) < 0.4] = nan
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=50)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counted(counts))
    expected = [
        metrics.mean_over_images(np.repeat(values, c, 0), np.repeat(classes, c)) for c in counts
    ]
    np.testing.assert_allclose(metrics.bootstrap_means(values, classes, draws=50), expected)


def test_bootstrap_by_class_centres_on_the_mean_by_class_with_gaps():
    """Gaps that go with the class must not pull the interval off the ratio it is printed beside."""
    classes = np.repeat([0, 1], 100)
    values = np.where(classes == 0, 1.0, 0.0)[:, None]
    values[:80] = nan
    draws = metrics.bootstrap_means(values, classes)[:, 0]
    assert metrics.mean_over_images(values, classes) == [0.5]
    np.testing.assert_allclose(draws, 0.5)


def test_classes_give_the_mean_of_class_means():
    labels = np.array([0] * 90 + [1] * 10)
    values = np.where(labels == 0, 0.8, 0.2)[:, None] + np.tile([-0.1, 0.1], 50)[:, None]
    class_mean = np.mean([values[labels == c].mean() for c in (0, 1)])  # (0.8 + 0.2) / 2, not 0.74
    assert class_mean == pytest.approx(0.5)
    draws = metrics.bootstrap_means(values, labels, draws=4000)[:, 0]
    assert draws.mean() == pytest.approx(class_mean, abs=0.01)
    assert metrics.bootstrap_means(values, draws=4000).mean() == pytest.approx(0.74, abs=0.005)


def test_a_column_without_images_is_nan():
    draws = metrics.bootstrap_means(np.array([[1.0, nan], [1.0, nan]]), draws=10)
    assert (draws[:, 0] == 1).all()
    assert np.isnan(draws[:, 1]).all()
    none = metrics.bootstrap_means(np.empty((0, 3)), draws=7)
    assert none.shape == (7, 3)
    assert np.isnan(none).all()


def test_interval():
    assert metrics.interval(np.arange(1001.0)) == (25.0, 975.0)
    assert metrics.interval(np.append(np.arange(1001.0), [nan] * 50)) == (25.0, 975.0)
    assert all(map(math.isnan, metrics.interval(np.array([nan, nan]))))
    assert all(map(math.isnan, metrics.interval(np.array([]))))


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1),
        # this and the next: Newcombe, Statistics in Medicine 17 (1998), table I
        (
            81,
            263,
            0.2553,
            0.3662,
        ),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_known_values(hits, n, low, high):
    assert metrics.wilson_interval(hits, n) == pytest.approx((low, high), abs=6e-5)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.data())
def test_wilson_solves_its_quadratic(n, data):
    """The ends are where (share - p)^2 = z^2 p (1 - p) / n; scipy agrees; both are shares."""
    hits = data.draw(st.integers(0, n))
    low, high = metrics.wilson_interval(hits, n)
    assert 0 <= low <= hits / n + 1e-12
    assert hits / n - 1e-12 <= high <= 1
    z = stats.norm.ppf(0.975)
    for end in (low, high):
        assert (hits / n - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, abs=1e-12)
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_of_nothing():
    assert all(map(math.isnan, metrics.wilson_interval(0, 0)))


@pytest.mark.parametrize(("heads", "slack"), [(4, 1e-12), (9, 0.02)])
def test_pairings_of_noise_are_as_often_below_any_p_as_p_says(heads, slack):
    rng = np.random.default_rng(1)
    found = np.array(
        [metrics.pairing_p_value(rng.normal(size=(heads, heads)), draws=400) for _ in range(400)]
    )
    assert (found <= 0.25).mean() == pytest.approx(0.25, abs=0.07)
    assert found.min() >= (1 / 24 if heads == 4 else 1 / 401) - slack
    assert metrics.pairing_p_value(np.eye(heads), draws=400) <= 1 / 24
    assert metrics.pairing_p_value(np.eye(heads)[::-1].copy() - 2 * np.eye(heads)) > 0.9
    assert metrics.pairing_p_value(np.ones((heads, heads))) == 1
    assert math.isnan(metrics.pairing_p_value(np.full((heads, heads), nan)))
    assert math.isnan(metrics.pairing_p_value(np.ones((1, 1))))


def test_rank_trend_is_spearmans():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, size=(20, 4, 9)).astype(float)  # with ties
    found = metrics.rank_trend(values)
    assert found.shape == (20, 4)
    for place in np.ndindex(20, 4):
        assert found[place] == pytest.approx(
            stats.spearmanr(values[place], np.arange(9)).statistic, abs=1e-12
        )
    assert metrics.rank_trend(np.array([[1.0, 2, 30], [5, 4, 3], [2, 2, 2]])).tolist()[:2] == [
        1,
        -1,
    ]
    assert math.isnan(metrics.rank_trend(np.ones(4)))
    assert math.isnan(metrics.rank_trend(np.array([1.0, nan, 2])))
    holes = np.array([3.0, nan, 1, 2, nan, 0.5])
    assert metrics.rank_trend(holes) == pytest.approx(
        stats.spearmanr([3, 1, 2, 0.5], range(4)).statistic
    )


def test_shuffled_rows_keep_rows_and_lose_order():
    values = np.arange(12.0).reshape(2, 6)
    draws = metrics.shuffled_rows(values, seed=1)
    assert draws.shape == (2000, 2, 6)
    np.testing.assert_array_equal(np.sort(draws, axis=-1), np.broadcast_to(values, draws.shape))
    trends = metrics.rank_trend(draws)
    assert abs(trends.mean()) < 0.02
    # variance of Spearman's rho: 1 / (n - 1)
    assert trends.std() == pytest.approx(1 / math.sqrt(5), abs=0.02)
    assert abs(np.corrcoef(trends.T)[0, 1]) < 0.06  # each row in an order of its own
    np.testing.assert_array_equal(draws, metrics.shuffled_rows(values, seed=1))
    holes = metrics.shuffled_rows(np.array([[1.0, nan, 2, 3]]), draws=50)[:, 0]
    assert np.isnan(holes[:, 1]).all()
    assert len({tuple(row) for row in np.delete(holes, 1, axis=1)}) == 6


def test_one_vs_rest_is_sklearns():
    from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score

    rng = np.random.default_rng(3)
    truth, said = rng.random((50, 4)) < 0.3, rng.random((50, 4)) < 0.5
    said[:, 3] = False  # never said: precision 0
    recall, precision, balanced = metrics.one_vs_rest(
        torch.from_numpy(said), torch.from_numpy(truth)
    )
    for k in range(4):
        assert recall[k].item() == pytest.approx(recall_score(truth[:, k], said[:, k]))
        assert precision[k].item() == pytest.approx(
            precision_score(truth[:, k], said[:, k], zero_division=0)
        )
        assert balanced[k].item() == pytest.approx(balanced_accuracy_score(truth[:, k], said[:, k]))


def test_one_vs_rest_of_ten_classes_that_are_48_percent_right_is_what_routing_the_lottery_prints():
    """Recall .480 with the errors spread evenly over nine classes: TNR 1 - .52 / 9 = .942, balanced
    accuracy .711."""
    truth = torch.eye(10, dtype=torch.bool).repeat_interleave(900, 0)
    named = torch.arange(10).repeat_interleave(900)
    wrong = torch.arange(9000) % 900 >= 432  # 468 of 900: 52 an other class
    named[wrong] = (named[wrong] + 1 + torch.arange(9000)[wrong] % 9) % 10
    recall, precision, balanced = metrics.one_vs_rest(torch.eye(10, dtype=torch.bool)[named], truth)
    torch.testing.assert_close(recall, torch.full((10,), 0.48).double())
    torch.testing.assert_close(2 * balanced - recall, torch.full((10,), 1 - 0.52 / 9).double())
    assert balanced.mean().item() == pytest.approx(0.711, abs=5e-4)
    torch.testing.assert_close(precision, torch.full((10,), 0.48).double())


def test_one_vs_rest_without_an_image_of_the_class_is_nan():
    truth = torch.tensor([[True, False], [True, False]])
    recall, precision, balanced = metrics.one_vs_rest(truth, truth)
    assert recall.isnan().tolist() == [False, True]
    assert balanced.isnan().all()  # of the first there is no other image
    assert precision.tolist() == [1, 0]
