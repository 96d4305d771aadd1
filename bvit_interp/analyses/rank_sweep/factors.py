"""Which k directions of a weight to keep, and the loss.

Every cut projects the output, ``W_k = P_k W`` with P_k onto k orthonormal directions.

- `factors(W)`: the directions of the largest singular values, the truncated SVD (Eckart & Young,
  1936). It has the least ||W - W_k||.
- `factors(W, C)`: the eigenvectors of W C W^T with the largest eigenvalues, where C = E[x x^T] is
  the second moment of real inputs x. It has the least E||W x - W_k x||^2. These are the weights of
  SVD-LLM (Wang et al., 2024, https://arxiv.org/abs/2403.07378), which takes the truncated SVD of
  W S times S^-1 with S S^T = C. No inverse is needed here, so C may be singular. ASVD (Yuan et al.,
  2023, https://arxiv.org/abs/2312.05821) takes a diagonal S.
- `random_factors(W)`: random directions, the null of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """``W = left @ right``, the directions to keep first.

    Parameters
    ----------
    left : orthonormal columns, float64; r = min(outputs, inputs).
    right : ``left.T @ W``, float64.
    """

    left: Float[Tensor, "outputs r"]
    right: Float[Tensor, "r inputs"]

    @property
    def full_rank(self) -> int:
        """r."""
        return self.right.shape[0]

    def cut(self, rank: int) -> tuple[Float[Tensor, "outputs k"], Float[Tensor, "k inputs"]]:
        """Thin factors of W_k."""
        return self.left[:, :rank], self.right[:rank]

    def energy(self, rank: int) -> float:
        """||W_k||^2 / ||W||^2 in the Frobenius norm, 0..1; for the SVD the share of squared
        singular values."""
        squared = self.right.square().sum(1)
        return float(squared[:rank].sum() / squared.sum())

    def error(self, rank: int, moment: Float[Tensor, "inputs inputs"]) -> float:
        """E||W x - W_k x||^2 / E||W x||^2 over inputs x of this second moment, 0..1."""
        # the mean squared output along each direction
        outputs = ((self.right @ moment.to(self.right)) * self.right).sum(1)
        return float((outputs[rank:].sum() / outputs.sum()).clamp(0, 1))


def factors(
    weight: Float[Tensor, "outputs inputs"], moment: Float[Tensor, "inputs inputs"] | None = None
) -> Factors:
    """The directions of W by singular value, or by output energy under inputs of `moment`.

    Parameters
    ----------
    weight : W.
    moment : E[x x^T] of the inputs, symmetric, positive semi-definite, of any scale.
    """
    left, right = _svd(weight)
    if moment is None:
        return Factors(left, right)
    # W C W^T in the basis `left`: (r, r), also where W has more outputs than inputs
    outputs = right @ moment.to(right) @ right.mT
    rotation = torch.linalg.eigh((outputs + outputs.mT) / 2).eigenvectors.flip(-1)
    return Factors(left @ rotation, rotation.mT @ right)


def random_factors(weight: Float[Tensor, "outputs inputs"], generator: torch.Generator) -> Factors:
    """Random directions of W, uniform (Haar) in its column space; drawn on the CPU.

    They are drawn among the outputs and then projected, so that they do not depend on the signs
    that a library gives to singular vectors.
    """
    left, right = _svd(weight)
    drawn = torch.randn(left.shape, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(left.mT @ drawn.to(left)).Q
    return Factors(left @ rotation, rotation.mT @ right)


def _svd(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal left vectors, and the right ones times their singular values."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return left, values[:, None] * right
