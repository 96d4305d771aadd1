"""Spectra and their nulls, against values worked out by hand or computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

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


def wave(down, across, amplitude=1.0, height=24, width=30):
    """A cosine of so many cycles down and across an image ``(3, height, width)``."""
    y, x = np.mgrid[:height, :width]
    plane = amplitude * np.cos(2 * np.pi * (down * y / height + across * x / width))
    return torch.from_numpy(plane).expand(3, -1, -1)


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
    assert [metrics.energy_rank(singular, energy=k / d).item() for k in range(1, d + 1)] == list(
        range(1, d + 1)
    )


def test_all_of_the_energy_is_the_full_rank():
    singular = torch.linalg.svdvals(torch.randn(30, 12, generator=torch.Generator().manual_seed(0)))
    assert metrics.energy_rank(singular, energy=1.0) == 12


def test_energy_is_squared_and_leading_axes_stay():
    stack = torch.stack([torch.ones(20), torch.tensor([10.0] + [1.0] * 19), torch.zeros(20)]).view(
        3, 1, 20
    )
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
    np.testing.assert_allclose(
        found[:, :4], np.linalg.svd(thin.numpy(), compute_uv=False), rtol=1e-9
    )
    assert (found[:, 4:] < 1e-6).all()


@pytest.mark.parametrize(
    "shape", [(200, 100), (100, 200), (300, 50), (128, 128), (400, 20), (1000, 64)]
)
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


@pytest.mark.parametrize("k", [1, 3, 7])
def test_participation_ratio_of_k_equal_eigenvalues_is_k(k):
    basis = torch.linalg.qr(
        torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    assert metrics.participation_ratio(5 * basis[:, :k] @ basis[:, :k].T).item() == pytest.approx(k)


def test_participation_ratio_by_hand_and_of_nothing():
    matrices = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(2, 2)])
    found = metrics.participation_ratio(matrices)
    assert found[0].item() == pytest.approx(16 / 10)
    assert found[1].isnan()


@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (40, 5), (30, 30)])
def test_random_participation_ratio_against_drawn_points(rows, columns):
    """Exactly one over the mean of the inverse; close to the mean itself."""
    rng = np.random.default_rng(0)
    drawn = [np.cov(rng.normal(size=(rows, columns)).T) for _ in range(2000)]
    inverse = np.array([np.trace(c @ c) / np.trace(c) ** 2 for c in drawn])
    expected = metrics.random_participation_ratio(rows, columns)
    assert 1 / expected == pytest.approx(inverse.mean(), abs=4 * inverse.std() / np.sqrt(2000))
    assert expected == pytest.approx((1 / inverse).mean(), rel=0.03)
    assert math.isnan(metrics.random_participation_ratio(1, 4))


@pytest.mark.parametrize(("down", "across"), [(0, 1), (3, 0), (5, 7), (12, 0), (0, 15), (12, 15)])
def test_the_centroid_of_a_wave_is_its_frequency(down, across):
    expected = math.hypot(down / 24, across / 30)
    assert metrics.spectral_centroid(wave(down, across)).item() == pytest.approx(
        expected, abs=1e-12
    )
    # neither brightness nor contrast counts
    assert metrics.spectral_centroid(0.4 + 0.01 * wave(down, across)).item() == pytest.approx(
        expected, abs=1e-9
    )


def test_the_centroid_of_two_waves_is_weighted_by_power():
    both = wave(0, 3, 2.0) + wave(6, 0, 1.0)
    expected = (4 * 3 / 30 + 1 * 6 / 24) / 5
    assert metrics.spectral_centroid(both).item() == pytest.approx(expected, abs=1e-12)


def test_the_centroid_of_colours_noise_and_nothing():
    opposed = wave(0, 3) * torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1)  # cancels in grey
    stack = torch.stack([opposed, torch.full((3, 24, 30), 0.3, dtype=torch.float64), wave(0, 3)])
    assert metrics.spectral_centroid(stack).isnan().tolist() == [True, True, False]
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    # mean distance from the centre of a unit square: (sqrt 2 + ln(1 + sqrt 2)) / 6
    assert metrics.spectral_centroid(noise).item() == pytest.approx(
        (2**0.5 + math.asinh(1)) / 6, abs=0.01
    )


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError):
        metrics.singular_values_of_gram(torch.zeros(3, 4))
    with pytest.raises(TypeCheckError):
        metrics.participation_ratio(torch.zeros(2, 3, 4))
    with pytest.raises(TypeCheckError):
        metrics.spectral_centroid(torch.zeros(8, 8))
    with pytest.raises(TypeCheckError):
        metrics.energy_rank(torch.tensor(1.0))
