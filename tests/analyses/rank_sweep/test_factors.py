"""Cuts against numpy's SVD and SVD-LLM's formula with a Cholesky factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.rank_sweep.factors import factors, random_factors

WEIGHTS = [(48, 12), (12, 48), (16, 16)]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def inputs(width, count=400):
    """Correlated, with a mean and with scales over two decades."""
    return (
        drawn(count, width, seed=1) * np.geomspace(1, 0.01, width) @ drawn(width, width, seed=2)
        + 0.3
    )


def weight_of(cut, rank):
    left, right = cut.cut(rank)
    return (left @ right).numpy()


def relative_error(x, weight, cut):
    return np.square(x @ (weight - cut).T).sum() / np.square(x @ weight.T).sum()


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_is_numpys(shape, rank):
    weight = drawn(*shape)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    cut = factors(torch.tensor(weight))
    np.testing.assert_allclose(
        weight_of(cut, rank), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-12
    )
    assert cut.energy(rank) == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum())
    assert cut.full_rank == len(s)


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_whitened_is_svd_llms_formula(shape, rank):
    """W_k = (W S)_k S^-1 with the Cholesky factor S of C, as its paper has it."""
    weight, x = drawn(*shape), inputs(shape[1])
    moment = x.T @ x / len(x)
    root = np.linalg.cholesky(moment)
    u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    cut = factors(torch.tensor(weight), torch.tensor(moment))
    np.testing.assert_allclose(weight_of(cut, rank), expected, atol=1e-6 * np.abs(expected).max())
    # the singular values dropped are the loss: the paper's theorem
    assert cut.error(rank, torch.tensor(moment)) == pytest.approx(
        (s[rank:] ** 2).sum() / (s**2).sum(), rel=1e-6
    )


@pytest.mark.parametrize("shape", WEIGHTS)
def test_error_is_that_of_the_outputs_themselves_and_least_when_whitened(shape):
    weight, x = drawn(*shape), inputs(shape[1])
    moment = torch.tensor(x.T @ x)  # of any scale
    generator = torch.Generator().manual_seed(0)
    cuts = {
        "svd": factors(torch.tensor(weight)),
        "whitened": factors(torch.tensor(weight), moment),
        "random": random_factors(torch.tensor(weight), generator),
    }
    for rank in (1, 4, 9):
        errors = {name: cut.error(rank, moment) for name, cut in cuts.items()}
        for name, cut in cuts.items():
            assert errors[name] == pytest.approx(
                relative_error(x, weight, weight_of(cut, rank)), rel=1e-6
            ), name
        assert errors["whitened"] < 0.9 * errors["svd"]
        assert errors["whitened"] < 0.9 * errors["random"]
        energies = {name: cut.energy(rank) for name, cut in cuts.items()}
        assert energies["svd"] > max(energies["whitened"], energies["random"])
        for name, cut in cuts.items():
            kept = np.square(weight_of(cut, rank)).sum() / np.square(weight).sum()
            assert energies[name] == pytest.approx(kept), name
    for cut in cuts.values():
        assert cut.error(cut.full_rank, moment) == 0.0
        assert cut.energy(cut.full_rank) == pytest.approx(1.0)


def test_inputs_of_few_directions_need_as_many_and_no_inverse():
    """C of rank 3 has no Cholesky factor; three directions lose nothing."""
    x = drawn(100, 3) @ drawn(3, 12, seed=3)
    weight, moment = drawn(48, 12, seed=4), x.T @ x / 100
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(moment)
    cut = factors(torch.tensor(weight), torch.tensor(moment))
    assert cut.error(3, torch.tensor(moment)) < 1e-12
    np.testing.assert_allclose(x @ weight_of(cut, 3).T, x @ weight.T, atol=1e-9)
    assert factors(torch.tensor(weight)).error(3, torch.tensor(moment)) > 0.05


def test_white_inputs_make_both_the_svd():
    weight = torch.tensor(drawn(20, 7))
    for rank in range(1, 8):
        np.testing.assert_allclose(
            weight_of(factors(weight, 3 * torch.eye(7, dtype=torch.float64)), rank),
            weight_of(factors(weight), rank),
            atol=1e-10,
        )


def test_random_directions_are_seeded_orthonormal_and_keep_k_of_r_on_average():
    weight = torch.tensor(drawn(30, 10))
    first, again = (random_factors(weight, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.left, again.left)
    np.testing.assert_allclose(first.left.T @ first.left, np.eye(10), atol=1e-12)
    np.testing.assert_allclose(weight_of(first, 10), weight, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    energies = [random_factors(weight, generator).energy(4) for _ in range(300)]
    assert np.mean(energies) == pytest.approx(0.4, abs=0.02)


def test_wrong_shapes_are_refused():
    weight = torch.zeros(6, 4, dtype=torch.float64)
    with pytest.raises(TypeCheckError):
        factors(weight[0])
    with pytest.raises(TypeCheckError):
        factors(weight, torch.eye(6, dtype=torch.float64))
    with pytest.raises(TypeCheckError):
        random_factors(weight[None], torch.Generator())
