"""Measures against numpy, scipy, scikit-learn, closed forms and masks worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from bvit_interp import metrics

nan = math.nan


def rank_by_hand(matrix: np.ndarray, energy: float) -> int:
    """The definition, read aloud: add squared singular values until the share is there."""
    squared = np.linalg.svd(matrix, compute_uv=False) ** 2
    held, k = 0.0, 0
    while held < energy * squared.sum() * (1 - 1e-12):
        held += squared[k]
        k += 1
    return k


# ---- rank ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (17, 17), (1, 9)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.999])
def test_energy_rank_against_numpy(shape, energy):
    rng = np.random.default_rng(sum(shape))
    for scale in (0.0, 0.1, 0.5):  # flat to steep spectra
        matrix = rng.normal(size=shape) * np.exp(-scale * np.arange(shape[1]))
        singular = torch.linalg.svdvals(torch.from_numpy(matrix))
        assert metrics.energy_rank(singular, energy).item() == rank_by_hand(matrix, energy)


@pytest.mark.parametrize("d", [1, 2, 7, 19, 20, 21, 100, 768])
def test_identity_needs_95_percent_of_its_directions(d):
    assert metrics.energy_rank(torch.ones(d)).item() == -(-95 * d // 100)


def test_closed_forms():
    rank_one = torch.linalg.svdvals(torch.outer(torch.arange(1.0, 9), torch.ones(5)).double())
    assert metrics.energy_rank(rank_one) == 1
    assert metrics.energy_rank(torch.zeros(6)) == 0
    assert metrics.energy_rank(torch.tensor([3.0, 0.0, 0.0]), energy=1.0) == 1
    assert metrics.energy_rank(torch.tensor([3.0, 2.0, 1e-3]), energy=1.0) == 3
    # squares 16, 9, 4, 1: shares 16/30, 25/30, 29/30
    assert metrics.energy_rank(torch.tensor([1.0, 3.0, 4.0, 2.0]), energy=0.5) == 1
    assert metrics.energy_rank(torch.tensor([1.0, 3.0, 4.0, 2.0]), energy=25 / 30) == 2
    assert metrics.energy_rank(torch.tensor([1.0, 3.0, 4.0, 2.0]), energy=0.834) == 3
    assert metrics.energy_rank(torch.tensor([1.0, 3.0, 4.0, 2.0]), energy=0.97) == 4


@pytest.mark.parametrize("d", [3, 10, 30, 49, 768])
def test_a_share_met_exactly_needs_no_rank_more(d):
    """k of d equal directions hold k / d, whatever the rounding of their sum."""
    singular = torch.full((d,), math.sqrt(0.1))
    assert [metrics.energy_rank(singular, energy=k / d).item() for k in range(1, d + 1)] == list(range(1, d + 1))


def test_all_of_the_energy_is_the_full_rank():
    singular = torch.linalg.svdvals(torch.randn(30, 12, generator=torch.Generator().manual_seed(0)))
    assert metrics.energy_rank(singular, energy=1.0) == 12


def test_energy_is_squared_and_leading_axes_stay():
    stack = torch.stack([torch.ones(20), torch.tensor([10.0] + [1.0] * 19), torch.zeros(20)]).view(3, 1, 20)
    ranks = metrics.energy_rank(stack)
    assert ranks.shape == (3, 1)
    assert ranks.dtype == torch.int64
    # 100 of 119 at first, 0.95 * 119 = 113.05: 14 more; unsquared it would be 10 of 29 and 18
    assert ranks.flatten().tolist() == [19, 15, 0]


def test_singular_values_of_gram():
    x = torch.randn(3, 50, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = metrics.singular_values_of_gram(x.mT @ x)
    np.testing.assert_allclose(found, np.linalg.svd(x.numpy(), compute_uv=False), rtol=1e-9)
    assert (found.diff(dim=-1) <= 0).all()
    thin = x[:, :4]  # rank 4 of 9: rounding may make an eigenvalue negative, never a nan
    found = metrics.singular_values_of_gram(thin.mT @ thin)
    np.testing.assert_allclose(found[:, :4], np.linalg.svd(thin.numpy(), compute_uv=False), rtol=1e-9)
    assert (found[:, 4:] < 1e-6).all()


@pytest.mark.parametrize("shape", [(200, 100), (100, 200), (300, 50), (128, 128), (400, 20), (1000, 64)])
def test_random_rank_is_that_of_a_gaussian_matrix(shape):
    rng = np.random.default_rng(3)
    drawn = np.mean([rank_by_hand(rng.normal(size=shape), 0.95) for _ in range(5)])
    assert abs(metrics.random_energy_rank(*shape) - drawn) <= 1
    drawn = np.mean([rank_by_hand(rng.normal(size=shape), 0.7) for _ in range(5)])
    assert abs(metrics.random_energy_rank(*shape, energy=0.7) - drawn) <= 1


def test_random_rank_of_a_base_ffn():
    assert metrics.random_energy_rank(3072, 768) == 661
    assert metrics.random_energy_rank(768, 3072) == 661
    x = np.random.default_rng(0).normal(size=(3072, 768)).astype(np.float32)
    eigenvalues = np.sort(np.linalg.eigvalsh(x.T @ x))[::-1]
    assert abs(661 - (np.cumsum(eigenvalues) < 0.95 * eigenvalues.sum()).sum() - 1) <= 1


def test_random_rank_at_its_ends():
    assert metrics.random_energy_rank(50, 10, energy=1.0) == 10
    assert metrics.random_energy_rank(50, 1) == 1
    assert metrics.random_energy_rank(10**7, 100) == 95  # nearly orthonormal columns


# ---- pointing ------------------------------------------------------------------------------------------


def test_patch_centres_on_paper():
    mask = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5],
            [10, 11, 12, 13, 14, 15],
            [20, 21, 22, 23, 24, 25],
            [30, 31, 32, 33, 34, 35],
        ]
    )[None]
    # 2 x 3 patches of 2 x 2 px: rows 1, 3 and columns 1, 3, 5
    assert metrics.at_patch_centres(mask, (2, 3)).tolist() == [[11, 13, 15, 31, 33, 35]]
    # 4 x 2 patches of 1 x 3 px: rows 0..3 and columns 1, 4
    assert metrics.at_patch_centres(mask, (4, 2)).tolist() == [[1, 4, 11, 14, 21, 24, 31, 34]]
    assert metrics.at_patch_centres(mask, (1, 1)).tolist() == [[23]]
    assert metrics.at_patch_centres(mask, (4, 6)).tolist() == [mask.flatten().tolist()]


def test_patch_centres_at_224():
    rows, columns = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    pixels = torch.stack([rows, columns])
    found = metrics.at_patch_centres(pixels, (14, 14)).view(2, 14, 14)
    for r in range(14):
        for c in range(14):
            assert found[:, r, c].tolist() == [16 * r + 8, 16 * c + 8]


def test_near_is_a_strict_disc():
    positive = torch.zeros(1, 5, 7, dtype=torch.bool)
    positive[0, 2, 3] = True
    assert metrics.near(positive, 0) is positive
    assert torch.equal(metrics.near(positive, 1), positive)  # a neighbour is at distance 1, not below it
    plus = torch.tensor(
        [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0] * 7]
    )
    assert torch.equal(metrics.near(positive, 1.2)[0].int(), plus.int())
    square = torch.tensor([[0] * 7, [0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0] * 7])
    assert torch.equal(metrics.near(positive, 2)[0].int(), square.int())  # sqrt(2) < 2, and 2 is not
    narrow, broad = [0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]
    disc = torch.tensor([narrow, broad, broad, broad, narrow])
    assert torch.equal(metrics.near(positive, 2.3)[0].int(), disc.int())  # sqrt(5) < 2.3 < sqrt(8)


@pytest.mark.parametrize("tolerance", [0.5, 1, 1.5, 3, 4.2, 15])
def test_near_is_scipys_distance_below_the_radius(tolerance):
    positive = torch.from_numpy(np.random.default_rng(5).random((3, 40, 31)) < 0.004)
    assert positive.flatten(1).any(1).all()
    distance = np.stack([ndimage.distance_transform_edt(~mask) for mask in positive.numpy()])
    assert np.array_equal(metrics.near(positive, tolerance).numpy(), distance < tolerance)


def test_near_of_nothing_is_nothing():
    assert not metrics.near(torch.zeros(2, 6, 6, dtype=torch.bool), 3).any()


def test_point_hits_on_paper():
    maps = torch.tensor(
        [
            [0.1, 0.9, 0.2, 0.3],  # on the object
            [0.1, 0.2, 0.9, 0.3],  # beside it
            [0.5, 0.5, 0.5, 0.1],  # three tie, two on the object
            [0.9, 0.9, 0.1, 0.1],  # two tie, one ignored, one on the object
            [0.9, 0.1, 0.1, 0.1],  # on ignored ground
            [0.9, 0.1, 0.9, 0.9],  # three tie, one ignored, none on the object
        ]
    )
    positive = torch.tensor([0, 1, 0, 0]).bool().expand(6, -1).clone()
    positive[2, 0] = True
    ignored = torch.zeros(6, 4, dtype=torch.bool)
    ignored[3:, 0] = True
    hits = metrics.point_hits(maps, positive, ignored)
    assert hits.dtype == torch.float64
    np.testing.assert_allclose(hits, [1, 0, 2 / 3, 1, nan, 0])


def test_ignored_ground_is_never_a_hit():
    maps, everything = torch.rand(3, 5), torch.ones(3, 5, dtype=torch.bool)
    assert metrics.point_hits(maps, everything, everything).isnan().all()


def test_steps_and_heads_are_scored_apart():
    generator = torch.Generator().manual_seed(2)
    maps = torch.randint(0, 4, (5, 3, 2, 9), generator=generator).float()  # coarse: many ties
    positive, ignored = (torch.rand(5, 9, generator=generator) < share for share in (0.4, 0.3))
    hits = metrics.point_hits(maps, positive, ignored)
    assert hits.shape == (5, 3, 2)
    for b, t, h in np.ndindex(5, 3, 2):
        best = max(maps[b, t, h].tolist())
        tied = [p for p in range(9) if maps[b, t, h, p] == best and not ignored[b, p]]
        expected = sum(bool(positive[b, p]) for p in tied) / len(tied) if tied else nan
        np.testing.assert_allclose(hits[b, t, h], expected)


def test_the_mask_as_map_always_hits_and_its_complement_never():
    positive = torch.rand(50, 36, generator=torch.Generator().manual_seed(4)) < 0.3
    nothing = torch.zeros_like(positive)
    assert (metrics.point_hits(positive.float(), positive, nothing) == 1).all()
    assert (metrics.point_hits(-positive.float(), positive, nothing) == 0).all()


def test_random_maps_hit_at_the_rate_of_the_mask_area():
    n, patches, covered = 4000, 49, 13
    positive = torch.zeros(n, patches, dtype=torch.bool)
    positive[:, :covered] = True
    maps = torch.rand(n, patches, generator=torch.Generator().manual_seed(6))
    hits = metrics.point_hits(maps, positive, torch.zeros_like(positive)).sum().item()
    low, high = stats.binom.interval(0.999, n, covered / patches)
    assert low <= hits <= high


# ---- intervals -----------------------------------------------------------------------------------------


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


class Counted:
    """A generator whose resamples are written down."""

    def __init__(self, counts):
        self.counts = counts

    def multinomial(self, n, shares, size):
        np.testing.assert_allclose(shares, 1 / n)
        assert size == len(self.counts)
        return np.array(self.counts)


def test_bootstrap_of_written_down_resamples(monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Counted([[3, 0, 0], [1, 1, 1], [0, 2, 1], [0, 3, 0]]))
    values = np.array([[1.0, 5.0], [4.0, nan], [7.0, 2.0]])
    found = metrics.bootstrap_means(values, draws=4)
    np.testing.assert_allclose(found, [[1, 5], [4, 3.5], [5, 2], [4, nan]])
    found = metrics.bootstrap_means(values, np.array([7, 3, 7]), draws=4)
    # classes {4} and {1, 7}; {nan} and {5, 2}: a class a resample misses, or with nothing but nan, is left out
    np.testing.assert_allclose(found, [[1, 5], [(4 + 4) / 2, 3.5], [(4 + 7) / 2, 2], [4, nan]])


def test_bootstrap_against_scipy():
    values = np.random.default_rng(1).exponential(size=(60, 1))
    draws = metrics.bootstrap_means(values, seed=0, draws=4000)[:, 0]
    theirs = stats.bootstrap((values[:, 0],), np.mean, n_resamples=4000, method="percentile", rng=1)
    error = values.std() / math.sqrt(60)  # of the plug-in distribution, exact for the bootstrap of a mean
    assert abs(draws.mean() - values.mean()) < 4 * error / math.sqrt(4000)
    assert draws.std() == pytest.approx(error, rel=0.05)
    assert metrics.interval(draws) == pytest.approx(tuple(theirs.confidence_interval), abs=0.15 * error)


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        low, high = metrics.interval(metrics.bootstrap_means(rng.normal(size=(80, 1)), seed=trial, draws=400)[:, 0])
        covered += low <= 0 <= high
    assert covered >= stats.binom.ppf(0.001, 200, 0.93)  # the percentile interval is a little short at n = 80
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
    np.testing.assert_allclose(metrics.mean_over_images(values, classes), values.mean(0))  # balanced classes
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
    expected = [metrics.mean_over_images(np.repeat(values, c, 0), np.repeat(classes, c)) for c in counts]
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
        (81, 263, 0.2553, 0.3662),  # this and the next: Newcombe, Statistics in Medicine 17 (1998), table I
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
