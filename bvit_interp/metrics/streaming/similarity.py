"""How alike two sets of states of the same images are: linear CKA and Procrustes distance, from
streamed moments.

Linear CKA is Kornblith et al.'s (2019, https://arxiv.org/abs/1905.00414), its debiased form that of
Nguyen et al. (2021, https://arxiv.org/abs/2010.15327) with the unbiased HSIC of Song et al. (2012);
the orthogonal Procrustes distance is as in Ding et al. (2021, https://arxiv.org/abs/2108.01661).
Nulls pair the states of one side with those of randomly permuted images on the other; they are ours
and need no shuffling (see `similarity`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError


class StatePairs(Metric):
    """MeanCI of several sets of states of the same images, and what they say of every pair of
    sets.

    Parameters
    ----------
    widths : width D_i of each of the P sets; F is their sum. Memory is F^2 float64 numbers, three
        times while measures are computed.
    seed : of the Gaussian matrix in the null of the Procrustes distance.
    """

    full_state_update = False
    gram: Tensor
    total: Tensor
    weighted: Tensor
    norms: Tensor
    count: Tensor

    def __init__(self, widths: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.widths, self.seed = list(widths), seed
        features, sets = sum(widths), len(widths)
        for name, shape in (
            ("gram", (features, features)),
            ("total", (features,)),
            ("weighted", (sets, features)),
            ("norms", (sets, sets)),
            ("count", ()),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, states: Sequence[Tensor]) -> None:
        """Add the states ``(B, D_i)`` of the same B images, one tensor a set."""
        if [state.shape[-1] for state in states] != self.widths:
            raise UserError(
                f"states must have widths {self.widths}, got {[state.shape[-1] for state in states]}"
            )
        flat = torch.cat([state.double().to(self.gram.device) for state in states], dim=1)
        if not torch.isfinite(flat).all():
            raise UserError("activations hold NaN or infinite values")
        square = torch.stack([part.square().sum(1) for part in flat.split(self.widths, dim=1)])
        self.gram.addmm_(flat.T, flat)
        self.total += flat.sum(0)
        self.weighted += square @ flat
        self.norms += square @ square.T
        self.count += len(flat)

    def compute(self) -> dict[str, np.ndarray]:
        """`similarity` of every pair of sets; numpy's, as torchmetrics would squeeze tensors of one
        number."""
        n = int(self.count)
        if not n:
            raise UserError("no image was measured")
        mean = self.total / n
        centred = torch.addr(self.gram, mean, mean, alpha=-n)
        found = similarity(centred, self._square_products(mean), self.widths, n, self.seed)
        return {name: values.cpu().numpy() for name, values in found.items()}

    def _square_products(self, mean: Tensor) -> Tensor:
        """``sum_i ||x_i - mean||^2 ||y_i - mean||^2`` of every pair of sets ``(P, P)``."""
        n, parts = self.count, mean.split(self.widths)
        means = torch.block_diag(*[part[None] for part in parts])  # (P, F)
        constant = means.square().sum(1)
        # ||x - m||^2 = r + ||m||^2 with r = ||x||^2 - 2 m.x
        linear = self.weighted @ means.T
        products = self.norms - 2 * (linear + linear.T) + 4 * means @ self.gram @ means.T
        diagonal = torch.stack([part.sum() for part in self.gram.diagonal().split(self.widths)])
        r = diagonal - 2 * n * constant
        return (
            products
            + r[:, None] * constant
            + constant[:, None] * r
            + n * constant[:, None] * constant
        )


def similarity(
    centred: Tensor, squares: Tensor, widths: Sequence[int], n: int, seed: int = 0
) -> dict[str, Tensor]:
    """Measures of every pair of sets, from their moments about the mean.

    Parameters
    ----------
    centred : X^T X of all P sets side by side, ``(F, F)``.
    squares : ``sum_i ||x_i||^2 ||y_i||^2`` of the centred rows, ``(P, P)``.
    widths : D_i of each set.
    n : images.

    Returns
    -------
    ``(P, P)`` float64 each; nan where a set does not vary or the images are too few (2; 4 for the
    debiased form):

    - ``cka`` = ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), 0..1;
    - ``cka_null``: its mean over all permutations of the images of Y, exactly
      tr(X^T X) tr(Y^T Y) / ((n - 1) ||X^T X||_F ||Y^T Y||_F);
    - ``cka_debiased``: the same ratio of unbiased estimates; its mean over permutations of the
      numerator is 0;
    - ``procrustes`` = min_R ||X - Y R||_F^2 of X and Y scaled to norm 1, 2 - 2 ||X^T Y||_*, 0
      (equal up to rotation and scale) .. 2;
    - ``procrustes_null``: of one draw of a Gaussian matrix with the second moments that X^T P Y has
      over random permutations P, (X^T X)^(1/2) Z (Y^T Y)^(1/2) / sqrt(n - 1).
    """
    sets = len(widths)
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    trace = torch.stack([centred[part, part].diagonal().sum() for part in parts])
    root = [torch.linalg.eigvalsh(centred[part, part]).clamp(min=0).sqrt() for part in parts]
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(max(widths), max(widths), generator=generator, dtype=torch.float64).to(
        centred.device
    )
    product, nuclear, random = (centred.new_zeros(sets, sets) for _ in range(3))
    for i in range(sets):
        for j in range(i, sets):
            cross = centred[parts[i], parts[j]]
            shuffled = (
                root[i][:, None]
                * gauss[: widths[i], : widths[j]]
                * root[j]
                / math.sqrt(max(n - 1, 1))
            )
            product[i, j] = product[j, i] = cross.square().sum()
            nuclear[i, j] = nuclear[j, i] = torch.linalg.svdvals(cross).sum()
            random[i, j] = random[j, i] = torch.linalg.svdvals(shuffled).sum()
    scale = _roots(trace)
    traces = trace[:, None] * trace
    unbiased = (
        product - squares * n / (n - 2) + traces / ((n - 1) * (n - 2))
        if n > 3
        else product * torch.nan
    )
    return {
        "cka": product / _roots(product.diagonal()),
        "cka_null": traces / _roots(product.diagonal()) / (n - 1) if n > 1 else product * torch.nan,
        "cka_debiased": unbiased / _roots(unbiased.diagonal()),
        "procrustes": (2 - 2 * nuclear / scale).clamp(min=0),
        "procrustes_null": (2 - 2 * random / scale).clamp(min=0),
    }


def _roots(squares: Tensor) -> Tensor:
    """``sqrt(a_i a_j)`` of ``(P,)``; nan where one is not positive."""
    roots = torch.where(squares > 0, squares, torch.nan).sqrt()
    return roots[:, None] * roots
