"""Spectra and exponents of the Jacobians along a run.

Exponents are those of Benettin et al. (1980): tangents are carried along the run and made
orthonormal by QR after every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.analyses.stability.jacobian import (
    Chain,
    Operator,
    gains,
    jacobians_along,
    pack,
    push_forward,
)
from bvit_interp.analyses.stability.krylov import largest_singular_values, spectral_radius
from bvit_interp.analyses.stability.vectors import energy_shares, seeded_normal, state_norms
from bvit_interp.metrics.checks import check_finite
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import State


def run_metrics(
    view: Model,
    state: State,
    index: Int[Tensor, " batch"],
    kinds: Sequence[slice],
    *,
    jacobian_steps: Sequence[int],
    horizon: int,
    leading: int,
    iterations: int,
    seed: int,
) -> dict[str, Float[Tensor, "batch ..."]]:
    """What the Jacobians of a run of S steps show.

    Parameters
    ----------
    view : from `differentiable`.
    state : step 0, ``(B, N, D)`` float64.
    index : positions of the images in the data set, from which random vectors are drawn.
    kinds : the tokens of each kind K, in packed states.
    jacobian_steps : the P steps whose own Jacobian is analysed.
    horizon : the step T of `ftle`, at most S.
    leading : number of singular values and exponents.
    iterations : products with a Jacobian, and as many with its transpose, for singular values.
    seed : of the random vectors.

    Returns
    -------
    Per image: `singular_value` (and `singular_value_residual`) ``(B, P, leading)``,
    `spectral_radius` (`spectral_radius_residual`) and `complex_eigenvalue` ``(B, P)``,
    `input_share` and `output_share` ``(B, P, K)``, `gain` ``(B, P, K, K)``, `state_growth` ``(B,
    S)``, `tangent_share` ``(B, S, K)``, `lyapunov_exponent` and `lyapunov_exponent_relative` ``(B,
    S, leading)``, `ftle` (`ftle_residual`) and `ftle_relative` ``(B, 1, leading)``.

    Raises
    ------
    UserError
        For a state that holds NaN or infinite values.
    """
    packed, index = check_finite(pack(view, state)), index.to(state.tokens.device)
    start, probe = seeded_normal(index, (2, *packed.shape[1:]), seed, 0).unbind(1)
    tangents, _ = orthonormalise(seeded_normal(index, (leading, *packed.shape[1:]), seed, 1))
    norms, until_horizon = [state_norms(packed)], []
    by_step: dict[str, list[Tensor]] = {}
    for t, jacobian in enumerate(jacobians_along(view, state), start=1):
        norms.append(state_norms(check_finite(jacobian.output)))
        tangents, log_stretch = orthonormalise(push_forward(jacobian, tangents))
        metrics = {
            "log_stretch": log_stretch,
            "tangent_share": energy_shares(tangents[:, 0], kinds),
            "state_growth": norms[t] / norms[t - 1],
        }
        if t in jacobian_steps:
            metrics |= _step_metrics(jacobian, start, probe, kinds, leading, iterations)
        for metric, values in metrics.items():
            by_step.setdefault(metric, []).append(values)
        if t <= horizon:
            until_horizon.append(jacobian)
    worst = largest_singular_values(Chain(until_horizon), start, leading, iterations)
    stacked = {metric: torch.stack(values, dim=1) for metric, values in by_step.items()}
    elapsed = torch.arange(1, len(norms), dtype=packed.dtype, device=packed.device)[:, None]
    exponents = stacked.pop("log_stretch").cumsum(1) / elapsed
    growth_rate = stacked["state_growth"].log().cumsum(1)[..., None] / elapsed
    ftle = worst.values.log()[:, None] / horizon
    return stacked | {
        "lyapunov_exponent": exponents,
        "lyapunov_exponent_relative": exponents - growth_rate,
        "ftle": ftle,
        "ftle_relative": ftle - growth_rate[:, horizon - 1 : horizon],
        "ftle_residual": worst.residuals[:, None],
    }


def orthonormalise(
    tangents: Float[Tensor, "batch k tokens width"],
) -> tuple[Float[Tensor, "batch k tokens width"], Float[Tensor, "batch k"]]:
    """Orthonormal vectors of the same span, and log |R_ii| of the QR decomposition."""
    q, r = torch.linalg.qr(tangents.flatten(2).mT)
    log_stretch = r.diagonal(dim1=1, dim2=2).abs().log()
    return q.mT.unflatten(2, tangents.shape[2:]), log_stretch


def _step_metrics(
    jacobian: Operator,
    start: Tensor,
    probe: Tensor,
    kinds: Sequence[slice],
    leading: int,
    iterations: int,
) -> dict[str, Tensor]:
    """Metrics of one step's own Jacobian."""
    singular = largest_singular_values(jacobian, start, leading, iterations)
    eigenvalue = spectral_radius(jacobian, start, 2 * iterations)
    return {
        "singular_value": singular.values,
        "singular_value_residual": singular.residuals,
        "input_share": energy_shares(singular.right, kinds),
        "output_share": energy_shares(singular.left, kinds),
        "spectral_radius": eigenvalue.radius,
        "spectral_radius_residual": eigenvalue.residual,
        "complex_eigenvalue": eigenvalue.is_complex.double(),
        "gain": gains(jacobian, probe[:, None], kinds),
    }
