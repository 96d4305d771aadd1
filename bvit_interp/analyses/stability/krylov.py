"""Largest singular values and the spectral radius, by Krylov iterations.

Singular values come from the bidiagonalisation of Golub & Kahan (1965), the spectral radius from
the iteration of Arnoldi (1951). Both are reorthogonalised in full, and give the residual of what
they estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bvit_interp.analyses.stability.jacobian import Operator


@dataclass(frozen=True)
class SingularValues:
    """Largest singular values of every image's Jacobian, estimated from below.

    Attributes
    ----------
    values : largest first.
    residuals : ``||J^T u - s v|| / s`` of each; a singular value lies within this share of the
        estimate.
    left, right : the unit vectors u and v of the first.
    """

    values: Float[Tensor, "batch k"]
    residuals: Float[Tensor, "batch k"]
    left: Float[Tensor, "batch tokens width"]
    right: Float[Tensor, "batch tokens width"]


def largest_singular_values(
    operator: Operator, start: Float[Tensor, "batch tokens width"], count: int, iterations: int
) -> SingularValues:
    """The `count` largest singular values.

    One vector is iterated, so a value that J has twice is found once.

    Parameters
    ----------
    start : a random vector per image.
    count : at most `iterations`.
    iterations : products with J, and as many with its transpose.
    """
    shape = start.shape[1:]
    size = start[0].numel()
    right = start.new_zeros(len(start), iterations + 1, size)
    left = start.new_zeros(len(start), iterations, size)
    alphas = start.new_zeros(len(start), iterations)
    betas = start.new_zeros(len(start), iterations)
    right[:, 0], _ = _normalised(start.flatten(1))
    for j in range(iterations):
        product = operator(right[:, j].unflatten(1, shape)).flatten(1)
        rest, _ = _orthogonalised(product, left[:, :j])
        left[:, j], alphas[:, j] = _normalised(rest, alphas[:, 0])
        product = operator.adjoint(left[:, j].unflatten(1, shape)).flatten(1)
        rest, _ = _orthogonalised(product, right[:, : j + 1])
        right[:, j + 1], betas[:, j] = _normalised(rest, alphas[:, 0])
    bidiagonal = alphas.diag_embed() + betas[:, :-1].diag_embed(1)
    p, values, q = torch.linalg.svd(bidiagonal)
    residuals = (betas[:, -1:] * p[:, -1]).abs() / values
    u = torch.einsum("bm,bmn->bn", p[:, :, 0], left)
    v = torch.einsum("bm,bmn->bn", q[:, 0], right[:, :-1])
    return SingularValues(
        values[:, :count], residuals[:, :count], u.unflatten(1, shape), v.unflatten(1, shape)
    )


@dataclass(frozen=True)
class LeadingEigenvalue:
    """The eigenvalue of largest modulus of every image's Jacobian.

    Attributes
    ----------
    radius : its modulus.
    is_complex : whether it is one of a complex pair.
    residual : ``||J y - l y|| / |l|`` of its unit Ritz vector. The eigenvalue l is exact for a
        matrix that differs from J by this share of |l|. For a matrix far from normal this need not
        bound the error of l.
    """

    radius: Float[Tensor, " batch"]
    is_complex: Bool[Tensor, " batch"]
    residual: Float[Tensor, " batch"]


def spectral_radius(
    operator: Operator, start: Float[Tensor, "batch tokens width"], iterations: int
) -> LeadingEigenvalue:
    """The spectral radius.

    Parameters
    ----------
    start : a random vector per image.
    iterations : products with J.
    """
    shape = start.shape[1:]
    basis = start.new_zeros(len(start), iterations + 1, start[0].numel())
    hessenberg = start.new_zeros(len(start), iterations + 1, iterations)
    basis[:, 0], _ = _normalised(start.flatten(1))
    for j in range(iterations):
        product = operator(basis[:, j].unflatten(1, shape)).flatten(1)
        rest, hessenberg[:, : j + 1, j] = _orthogonalised(product, basis[:, : j + 1])
        basis[:, j + 1], hessenberg[:, j + 1, j] = _normalised(rest, product.norm(dim=1))
    below = hessenberg[:, -1, -1]
    eigenvalues, vectors = torch.linalg.eig(hessenberg[:, :-1].cpu())
    first = eigenvalues.abs().argmax(1, keepdim=True)
    leading = eigenvalues.gather(1, first)[:, 0]
    last_coordinate = vectors[:, -1].gather(1, first)[:, 0]
    radius = leading.abs().to(start.device)
    return LeadingEigenvalue(
        radius,
        (leading.imag.abs() > 1e-9 * leading.abs()).to(start.device),
        below * last_coordinate.abs().to(start.device) / radius,
    )


def _orthogonalised(
    vectors: Float[Tensor, "batch n"], basis: Float[Tensor, "batch m n"]
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch m"]]:
    """The part orthogonal to an orthonormal basis, and the coordinates of the rest.

    The projection is taken off twice against rounding (Kahan's "twice is enough"; Parlett, 1980).
    """
    total = vectors.new_zeros(basis.shape[:2])
    for _ in range(2):
        coordinates = torch.einsum("bmn,bn->bm", basis, vectors)
        vectors = vectors - torch.einsum("bm,bmn->bn", coordinates, basis)
        total = total + coordinates
    return vectors, total


def _normalised(
    vectors: Float[Tensor, "batch n"], scale: Tensor | float = 0.0
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, " batch"]]:
    """Unit vectors and their lengths; both are 0 where the length is rounding error of `scale`."""
    length = vectors.norm(dim=1)
    nonzero = length > 1e-12 * torch.as_tensor(scale)
    unit = vectors * torch.where(nonzero, 1 / length, 0.0)[:, None]
    return unit, torch.where(nonzero, length, 0.0)
