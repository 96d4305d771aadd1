"""Exponents and spectra along a run against full Jacobians, and maps whose answers are on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch.utils._python_dispatch import TorchDispatchMode

from bvit_interp.analyses.stability.jacobian import (
    Chain,
    Linearised,
    differentiable,
    jacobians_along,
    push_forward,
    step_map,
)
from bvit_interp.analyses.stability.krylov import largest_singular_values, spectral_radius
from bvit_interp.analyses.stability.run_metrics import orthonormalise, run_metrics
from bvit_interp.analyses.stability.vectors import seeded_normal
from bvit_interp.errors import UserError
from bvit_interp.models.stepping import State, embed, states

INDEX = torch.tensor([3, 8])


def test_exponents_of_a_linear_map():
    """Four exponents add up to log |det A| per step whatever the start; in the long run they are
    log |l_i|."""
    moduli = torch.tensor([1.3, 0.9, 0.5, 0.3], dtype=torch.float64)
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).standard_normal((4, 4))))[0]
    matrix = basis @ torch.diag(moduli) @ basis.T
    start = seeded_normal(INDEX, (2, 2), 0)
    step = Linearised(lambda z: (z.flatten(1) @ matrix.T).unflatten(1, (2, 2)), start)
    tangents, logs = orthonormalise(seeded_normal(INDEX, (4, 2, 2), 0))[0], []
    for _ in range(60):
        tangents, log_stretch = orthonormalise(push_forward(step, tangents))
        logs.append(log_stretch)
        gram = tangents.flatten(2) @ tangents.flatten(2).mT
        np.testing.assert_allclose(gram, np.eye(4)[None].repeat(2, 0), atol=1e-12)
    np.testing.assert_allclose(logs[0].sum(1), moduli.log().sum(), atol=1e-10)
    np.testing.assert_allclose(torch.stack(logs[30:]).mean(0), [moduli.log()] * 2, atol=1e-3)
    worst = largest_singular_values(Chain([step] * 5), start, 2, 4).values.log() / 5
    np.testing.assert_allclose(worst[:, 0], math.log(1.3), atol=1e-9)


def test_a_run_past_the_horizon_against_full_jacobians(make, images):
    """T = 2 of S = 4 steps; every number from numpy's decompositions of 160 x 160 matrices."""
    model = make(img_size=16, num_steps=2)
    view = differentiable(model, 4)
    state = embed(view, images[:2, :, :16, :16].double())
    kinds = [slice(0, 1), slice(1, 5)]
    result = run_metrics(
        view,
        state,
        INDEX,
        kinds,
        jacobian_steps=[1, 3],
        horizon=2,
        leading=2,
        iterations=40,
        seed=7,
    )
    shapes = {metric: tuple(values.shape) for metric, values in result.items()}
    assert shapes == {
        **{f"singular_value{end}": (2, 2, 2) for end in ("", "_residual")},
        **{f"spectral_radius{end}": (2, 2) for end in ("", "_residual")},
        "complex_eigenvalue": (2, 2),
        "input_share": (2, 2, 2),
        "output_share": (2, 2, 2),
        "gain": (2, 2, 2, 2),
        "state_growth": (2, 4),
        "tangent_share": (2, 4, 2),
        "lyapunov_exponent": (2, 4, 2),
        "lyapunov_exponent_relative": (2, 4, 2),
        "ftle": (2, 1, 2),
        "ftle_relative": (2, 1, 2),
        "ftle_residual": (2, 1, 2),
    }
    for b in range(2):
        image = images[b : b + 1, :, :16, :16].double()
        run_states = list(states(view, image))
        run = [each.tokens for each in run_states]
        jacobians = []
        for t in range(4):
            step = step_map(view, run_states[t])
            full = torch.autograd.functional.jacobian(lambda z, step=step: step(z)[0], run[t])
            jacobians.append(full[:, :, 0].reshape(160, 160).numpy())
        norms = [z.norm().item() for z in run]
        np.testing.assert_allclose(
            result["state_growth"][b], [norms[t] / norms[t - 1] for t in range(1, 5)]
        )
        for i, t in enumerate((1, 3)):
            u, s, vh = np.linalg.svd(jacobians[t - 1])
            np.testing.assert_allclose(result["singular_value"][b, i], s[:2], rtol=1e-4)
            inside = [np.square(each[:32]).sum() for each in (vh[0], u[:, 0])]
            assert result["input_share"][b, i, 0].item() == pytest.approx(inside[0], rel=1e-2)
            assert result["output_share"][b, i, 0].item() == pytest.approx(inside[1], rel=1e-2)
            eigenvalues = np.linalg.eigvals(jacobians[t - 1])
            leading = eigenvalues[np.abs(eigenvalues).argmax()]
            assert result["spectral_radius"][b, i].item() == pytest.approx(abs(leading), rel=1e-4)
            assert result["complex_eigenvalue"][b, i].item() == float(abs(leading.imag) > 1e-9)
            probe = seeded_normal(INDEX, (2, 5, 32), 7, 0)[b, 1].flatten().numpy()
            only_cls = np.where(np.arange(160) < 32, probe, 0)
            passed = np.linalg.norm((jacobians[t - 1] @ only_cls)[32:]) / np.linalg.norm(only_cls)
            assert result["gain"][b, i, 0, 1].item() == pytest.approx(passed)
        # the horizon is T = 2, not S = 4: of the Jacobians as of the growth of the state
        worst = np.log(np.linalg.svd(jacobians[1] @ jacobians[0])[1][:2]) / 2
        np.testing.assert_allclose(result["ftle"][b, 0], worst, rtol=1e-4)
        growth = math.log(norms[2] / norms[0]) / 2
        assert abs(growth - math.log(norms[4] / norms[0]) / 4) > 1e-2
        np.testing.assert_allclose(result["ftle_relative"][b, 0], worst - growth, atol=1e-5)
        # Benettin's exponents: the area that two tangents span
        tangents = seeded_normal(INDEX, (2, 5, 32), 7, 1)[b].flatten(1).numpy().T
        before = np.diag(np.linalg.qr(tangents)[1])
        product = np.eye(160)
        for t in range(1, 5):
            product = jacobians[t - 1] @ product
            after = np.diag(np.linalg.qr(product @ tangents)[1])
            exponents = np.log(np.abs(after / before)) / t
            np.testing.assert_allclose(result["lyapunov_exponent"][b, t - 1], exponents, rtol=1e-6)
            relative = exponents - math.log(norms[t] / norms[0]) / t
            np.testing.assert_allclose(
                result["lyapunov_exponent_relative"][b, t - 1], relative, rtol=1e-6, atol=1e-9
            )
            first = product @ tangents[:, 0]
            share = np.square(first[:32]).sum() / np.square(first).sum()
            assert result["tangent_share"][b, t - 1, 0].item() == pytest.approx(share, rel=1e-6)


def test_residuals_of_few_products(make, images):
    """They shrink with more products; the spectral radius has twice as many as the singular values
    have with J."""
    view = differentiable(make(img_size=16, num_steps=2), 2)
    state = embed(view, images[:2, :, :16, :16].double())
    options = {"jacobian_steps": [1], "horizon": 2, "leading": 1, "seed": 0}
    kinds = [slice(0, 5)]
    few, many = (
        run_metrics(view, state, INDEX, kinds, iterations=iterations, **options)
        for iterations in (2, 40)
    )
    for metric in ("singular_value", "spectral_radius", "ftle"):
        assert (few[f"{metric}_residual"] > many[f"{metric}_residual"]).all()
    step = next(jacobians_along(view, state))
    start = seeded_normal(INDEX, (2, 5, 32), 0, 0)[:, 0]
    radius = spectral_radius(step, start, 4)
    torch.testing.assert_close(few["spectral_radius"][:, 0], radius.radius)
    torch.testing.assert_close(few["spectral_radius_residual"][:, 0], radius.residual)
    singular = largest_singular_values(step, start, 1, 2)
    torch.testing.assert_close(few["singular_value_residual"][:, 0], singular.residuals)


def test_states_that_are_not_finite(tiny, images):
    view = differentiable(tiny, 2)
    state = State(embed(view, images.double()).tokens * math.inf)
    options = {"jacobian_steps": [1], "horizon": 2, "leading": 1, "iterations": 2, "seed": 0}
    with pytest.raises(UserError, match="NaN or infinite"):
        run_metrics(view, state, torch.arange(4), [slice(0, 17)], **options)


def test_the_full_matrix_is_never_made(tiny, images):
    """No tensor of a product is as large as one image's Jacobian of 544 x 544."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(
                t.numel()
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, torch.Tensor)
            )
            return out

    view = differentiable(tiny, 1)
    state = embed(view, images[:2].double())
    options = {"jacobian_steps": [1], "horizon": 1, "leading": 2, "iterations": 8, "seed": 0}
    with Watch():
        run_metrics(view, state, INDEX, [slice(0, 17)], **options)
    assert 0 < max(largest) < 544 * 544


def test_a_wrong_shape_is_refused(tiny, images):
    view = differentiable(tiny, 2)
    options = {"jacobian_steps": [1], "horizon": 2, "leading": 1, "iterations": 2, "seed": 0}
    with pytest.raises(TypeCheckError):
        orthonormalise(torch.zeros(2, 3, 4))
    with pytest.raises(TypeCheckError):
        run_metrics(view, embed(view, images.double()), INDEX[None], [slice(0, 17)], **options)
