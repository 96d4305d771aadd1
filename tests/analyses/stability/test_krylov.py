"""Iterated spectra against matrices whose spectra are on paper, and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.stability.jacobian import Chain, Linearised
from bvit_interp.analyses.stability.krylov import largest_singular_values, spectral_radius
from bvit_interp.analyses.stability.vectors import seeded_normal

INDEX = torch.tensor([3, 8])


def start(*shape, seed=0):
    return seeded_normal(INDEX, shape, seed)


def linear(matrix, tokens, width):
    """The step z -> A z on the flattened tokens, at any state, the same for every image."""
    return Linearised(
        lambda z: (z.flatten(1) @ matrix.T).unflatten(1, (tokens, width)), start(tokens, width)
    )


@pytest.fixture
def normal_matrix():
    """A normal matrix of 6 x 6 with eigenvalues 1.3 exp(+-0.5 i), 0.9, 0.5, -0.3 and 0.1."""
    turn = 1.3 * torch.tensor(
        [[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]], dtype=torch.float64
    )
    diagonal = torch.block_diag(
        turn, torch.diag(torch.tensor([0.9, 0.5, -0.3, 0.1], dtype=torch.float64))
    )
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).standard_normal((6, 6))))[0]
    return basis @ diagonal @ basis.T


def test_a_normal_matrix(normal_matrix):
    """Its singular values are the moduli, the double one found once; the iteration stops by itself
    when the space is exhausted."""
    step = linear(normal_matrix, 3, 2)
    singular = largest_singular_values(step, start(3, 2, seed=1), 4, 10)
    np.testing.assert_allclose(singular.values, [[1.3, 0.9, 0.5, 0.3]] * 2, atol=1e-10)
    assert (singular.residuals < 1e-8).all()
    leading = spectral_radius(step, start(3, 2, seed=1), 10)
    np.testing.assert_allclose(leading.radius, [1.3, 1.3], atol=1e-10)
    assert leading.is_complex.all()
    assert (leading.residual < 1e-8).all()
    matrix = normal_matrix @ normal_matrix - 2 * normal_matrix
    other = spectral_radius(linear(matrix, 3, 2), start(3, 2), 6)
    expected = np.abs(np.linalg.eigvals(matrix.numpy())).max()
    np.testing.assert_allclose(other.radius, expected, rtol=1e-9)


def test_a_matrix_far_from_normal():
    """[[1, 10], [0, 0.5]]: eigenvalues 1 and 0.5, but s_1 s_2 = det = 0.5 and s_1^2 + s_2^2 =
    101.25."""
    matrix = torch.tensor([[1.0, 10.0], [0.0, 0.5]], dtype=torch.float64)
    step = linear(matrix, 2, 1)
    s_1, s_2 = largest_singular_values(step, start(2, 1), 2, 2).values[0]
    assert (s_1 * s_2).item() == pytest.approx(0.5)
    assert (s_1**2 + s_2**2).item() == pytest.approx(101.25)
    leading = spectral_radius(step, start(2, 1), 2)
    assert leading.radius[0].item() == pytest.approx(1.0)
    assert not leading.is_complex.any()


def test_residuals_are_those_of_the_vectors_before_convergence():
    """After few products the residual is that of the Ritz vector, computed here from the Krylov
    space itself."""
    matrix = torch.from_numpy(np.random.default_rng(1).standard_normal((8, 8)))
    step, first = linear(matrix, 4, 2), start(4, 2)
    a = matrix.numpy()
    singular = largest_singular_values(step, first, 1, 3)
    u, v = (each.flatten(1).numpy() for each in (singular.left, singular.right))
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1)
    s = singular.values.numpy()
    np.testing.assert_allclose(v @ a.T, s * u, atol=1e-12)
    residual = np.linalg.norm(u @ a - s * v, axis=1) / s[:, 0]
    assert residual.min() > 1e-3
    np.testing.assert_allclose(singular.residuals[:, 0], residual, rtol=1e-9)
    leading = spectral_radius(step, first, 3)
    for i in range(2):
        z = first[i].flatten().numpy()
        krylov = np.linalg.qr(np.stack([z, a @ z, a @ a @ z], axis=1))[0]
        eigenvalues, vectors = np.linalg.eig(krylov.T @ a @ krylov)
        j = np.abs(eigenvalues).argmax()
        y = krylov @ vectors[:, j]
        expected = np.linalg.norm(a @ y - eigenvalues[j] * y) / abs(eigenvalues[j])
        assert leading.radius[i].item() == pytest.approx(abs(eigenvalues[j]))
        assert leading.residual[i].item() == pytest.approx(expected)
        assert leading.is_complex[i].item() == (abs(eigenvalues[j].imag) > 1e-9)


def test_a_matrix_of_rank_one():
    """Once the space is exhausted, what is left is rounding error and gives no further value."""
    rng = np.random.default_rng(3)
    u, v = (torch.from_numpy(each) for each in rng.standard_normal((2, 6)))
    step = linear(torch.outer(u, v), 3, 2)
    values = largest_singular_values(step, start(3, 2), 3, 6).values
    expected = (u.norm() * v.norm()).item()
    np.testing.assert_allclose(values, [[expected, 0, 0]] * 2, atol=1e-9)
    radius = spectral_radius(step, start(3, 2), 6).radius
    np.testing.assert_allclose(radius, abs((u @ v).item()), rtol=1e-9)


def test_a_chain_of_steps(normal_matrix):
    """Its singular values are those of the product, in the order of application."""
    other = torch.from_numpy(np.random.default_rng(2).standard_normal((6, 6)))
    chain = Chain([linear(normal_matrix, 3, 2), linear(other, 3, 2)])
    values = largest_singular_values(chain, start(3, 2), 2, 6).values
    expected = np.linalg.svd((other @ normal_matrix).numpy())[1][:2]
    np.testing.assert_allclose(values, [expected] * 2, rtol=1e-9)


def test_a_wrong_shape_is_refused(normal_matrix):
    step = linear(normal_matrix, 3, 2)
    with pytest.raises(TypeCheckError):
        largest_singular_values(step, start(6), 1, 2)
    with pytest.raises(TypeCheckError):
        spectral_radius(step, start(6), 2)
