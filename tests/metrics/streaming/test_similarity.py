"""CKA and Procrustes from moments against numpy on the centred states, and their nulls against real
shuffles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.linalg import orthogonal_procrustes

from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.similarity import StatePairs, similarity


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n, seed=0):
    """Three sets of states of n images: x, one that shares part of it, and one of its own; none has
    mean 0."""
    scale = torch.linspace(3, 0.1, 6, dtype=torch.float64)
    x = drawn(seed, n, 6) * scale + 2
    return [
        x,
        torch.cat([x[:, :3] + 0.5 * drawn(seed + 1, n, 3), drawn(seed + 2, n, 2)], 1),
        drawn(seed + 3, n, 4) - 1,
    ]


def measured(sets, parts=None):
    metric = StatePairs([each.shape[1] for each in sets])
    for part in zip(*(each.split(parts or len(each)) for each in sets), strict=True):
        metric.update(part)
    return metric.compute()


def centred(x):
    return np.asarray(x) - np.asarray(x).mean(0)


def cka_of_kernels(x, y):
    """From the n x n kernels, as in Kornblith et al., eq. 4."""
    n = len(x)
    middle = np.eye(n) - 1 / n
    k, m = (middle @ (np.asarray(z) @ np.asarray(z).T) @ middle for z in (x, y))
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def unbiased_hsic(x, y):
    """Song et al., eq. 5, term by term."""
    n = len(x)
    k, m = (np.asarray(z) @ np.asarray(z).T for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


@pytest.mark.parametrize("parts", [None, 7])
def test_against_kernels_and_numpy(parts):
    sets = related(30)
    found = measured(sets, parts)
    for i, x in enumerate(sets):
        for j, y in enumerate(sets):
            assert found["cka"][i, j] == pytest.approx(cka_of_kernels(x, y), rel=1e-10)
            ratio = unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
            assert found["cka_debiased"][i, j] == pytest.approx(ratio, rel=1e-8)
            a, b = centred(x), centred(y)
            nuclear = (
                np.linalg.svd(a.T @ b, compute_uv=False).sum()
                / np.linalg.norm(a)
                / np.linalg.norm(b)
            )
            assert found["procrustes"][i, j] == pytest.approx(2 - 2 * nuclear, abs=1e-10)
    for values in found.values():
        np.testing.assert_allclose(values, values.T, rtol=1e-10)


def test_equal_up_to_rotation_scale_and_place():
    x = drawn(0, 50, 5)
    rotation = torch.linalg.qr(drawn(1, 5, 5)).Q
    found = measured([x, x, 3 * x @ rotation + 7])
    np.testing.assert_allclose(found["cka"], 1)
    np.testing.assert_allclose(found["cka_debiased"], 1)
    np.testing.assert_allclose(found["procrustes"], 0, atol=1e-10)


def test_the_best_rotation_is_what_scipy_finds():
    x, y = drawn(2, 20, 4), drawn(3, 20, 4)
    a, b = (centred(z) / np.linalg.norm(centred(z)) for z in (x, y))
    rotation, _ = orthogonal_procrustes(b, a)
    assert measured([x, y])["procrustes"][0, 1] == pytest.approx(
        np.linalg.norm(a - b @ rotation) ** 2
    )


def test_nulls_against_shuffled_images():
    sets = related(30)
    found = measured(sets)
    rng = np.random.default_rng(0)
    shuffled = [measured([sets[0], sets[1][rng.permutation(30)]]) for _ in range(400)]

    def of(name):
        draws = np.array([each[name][0, 1] for each in shuffled])
        return draws.mean(), 4 * draws.std() / 20

    mean, error = of("cka")
    assert found["cka_null"][0, 1] == pytest.approx(mean, abs=error)
    mean, error = of("cka_debiased")
    assert abs(mean) < error
    mean, error = of("procrustes")
    draws = [each["procrustes"][0, 1] for each in shuffled]
    # one draw of it
    assert found["procrustes_null"][0, 1] == pytest.approx(mean, abs=4 * np.std(draws))
    assert found["cka"][0, 1] > found["cka_null"][0, 1]
    assert found["procrustes"][0, 1] < found["procrustes_null"][0, 1]


def test_the_exact_null_over_all_permutations():
    x, y = drawn(4, 4, 2), drawn(5, 4, 3)
    every = [
        measured([x, y[list(order)]])["cka"][0, 1] for order in itertools.permutations(range(4))
    ]
    assert measured([x, y])["cka_null"][0, 1] == pytest.approx(np.mean(every))


def test_independent_sets_look_alike_when_images_are_few():
    """The reason for the null: with 10 images in 40 dimensions CKA of noise is high, its debiased
    form is not."""
    found = [measured([drawn(2 * i, 10, 40), drawn(2 * i + 1, 10, 40)]) for i in range(50)]
    assert np.mean([each["cka"][0, 1] for each in found]) > 0.7
    null = np.mean([each["cka_null"][0, 1] for each in found])
    assert null == pytest.approx(np.mean([each["cka"][0, 1] for each in found]), abs=0.02)
    assert abs(np.mean([each["cka_debiased"][0, 1] for each in found])) < 0.03


def test_too_few_images_and_constant_states():
    found = measured([drawn(0, 3, 2), torch.ones(3, 2, dtype=torch.float64)])
    assert np.isnan(found["cka_debiased"]).all()
    assert found["cka"][0, 0] == pytest.approx(1)
    assert np.isnan(found["cka"][1]).all()
    assert np.isnan(measured([drawn(0, 1, 2)])["cka_null"]).all()


def test_bad_states():
    metric = StatePairs([2, 3])
    with pytest.raises(UserError, match=r"widths \[2, 3\], got \[2, 2\]"):
        metric.update([torch.zeros(1, 2), torch.zeros(1, 2)])
    with pytest.raises(UserError, match="NaN or infinite"):
        metric.update([torch.zeros(1, 2), torch.full((1, 3), torch.nan)])
    metric = StatePairs([2, 3])
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(UserError, match="no image"),
    ):
        metric.compute()


def test_the_procrustes_null_is_one_gaussian_draw():
    """The formula term by term, with the matrix that the seed gives."""
    x, y = drawn(6, 9, 2) * torch.tensor([3.0, 1.0]), drawn(7, 9, 3)
    metric = StatePairs([2, 3], seed=5)
    metric.update([x, y])
    generator = torch.Generator().manual_seed(5)
    gauss = torch.randn(3, 3, generator=generator, dtype=torch.float64).numpy()[:2]
    a, b = centred(x), centred(y)
    # in the bases in which both moments are diagonal, smallest first
    left, right = (np.sort(np.linalg.svd(z, compute_uv=False)) for z in (a, b))
    drawn_product = np.diag(left) @ gauss @ np.diag(right) / np.sqrt(8)
    nuclear = np.linalg.svd(drawn_product, compute_uv=False).sum()
    expected = 2 - 2 * nuclear / np.linalg.norm(a) / np.linalg.norm(b)
    assert metric.compute()["procrustes_null"][0, 1] == pytest.approx(expected)


def test_no_measure_depends_on_the_scale():
    """Also the null, of states with fewer images than dimensions, whose moments are singular."""
    sets = [drawn(8, 4, 6), drawn(9, 4, 3)]
    one, small = measured(sets), measured([1e-3 * x for x in sets])
    for name, values in one.items():
        np.testing.assert_allclose(small[name], values, atol=1e-7, err_msg=name)


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError):
        StatePairs([2, 3]).update([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(TypeCheckError):
        similarity(torch.zeros(5, 4), torch.zeros(2, 2), [2, 3], 7)
