"""Linear CKA and Procrustes distance of sets of states, from streamed moments.

Linear CKA is that of Kornblith et al. (2019, https://arxiv.org/abs/1905.00414). Its debiased form
is that of Nguyen et al. (2021, https://arxiv.org/abs/2010.15327), with the unbiased HSIC of Song et
al. (2012). The orthogonal Procrustes distance is as in Ding et al. (2021,
https://arxiv.org/abs/2108.01661). The nulls pair the states of one side with those of randomly
permuted images on the other side. They are ours and need no shuffling (see `similarity`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite


class StatePairs(Metric):
    """Moments of several sets of states of the same images, and the similarity of all pairs.

    Parameters
    ----------
    widths : width D_i of each of the P sets; F is their sum. Memory is F^2 float64 numbers, and
        three times as much while the measures are computed.
    seed : random seed of the Gaussian matrix in the null of the Procrustes distance.

    Raises
    ------
    UserError
        For states of other widths, for NaN or infinite values, and for no images at all.
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

    def update(self, states: Sequence[Float[Tensor, "batch _"]]) -> None:
        """Add the states ``(B, D_i)`` of the same B images, one tensor per set."""
        widths = [state.shape[-1] for state in states]
        if widths != self.widths:
            raise UserError(f"states must have widths {self.widths}, got {widths}")
        flat = torch.cat([state.double().to(self.gram.device) for state in states], dim=1)
        check_finite(flat)
        square = torch.stack([part.square().sum(1) for part in flat.split(self.widths, dim=1)])
        self.gram.addmm_(flat.T, flat)
        self.total += flat.sum(0)
        self.weighted += square @ flat
        self.norms += square @ square.T
        self.count += len(flat)

    def compute(self) -> dict[str, Float[np.ndarray, "sets sets"]]:
        """`similarity` of every pair of sets; in numpy, because torchmetrics squeezes tensors of
        one number."""
        n = int(self.count)
        if not n:
            raise UserError("no image was measured")
        mean = self.total / n
        centred = torch.addr(self.gram, mean, mean, alpha=-n)
        measures = similarity(centred, self._square_products(mean), self.widths, n, self.seed)
        return {name: values.cpu().numpy() for name, values in measures.items()}

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
    centred: Float[Tensor, "features features"],
    squares: Float[Tensor, "sets sets"],
    widths: Sequence[int],
    n: int,
    seed: int = 0,
) -> dict[str, Float[Tensor, "sets sets"]]:
    """Measures of every pair of sets, from their moments about the mean.

    Parameters
    ----------
    centred : X^T X of all sets side by side.
    squares : ``sum_i ||x_i||^2 ||y_i||^2`` of the centred rows.
    widths : D_i of each set.
    n : number of images.
    seed : random seed of the Gaussian matrix in `procrustes_null`.

    Returns
    -------
    float64 each; nan where a set does not vary or there are too few images (at least 2; 4 for the
    debiased form):

    - ``cka`` = ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), 0..1;
    - ``cka_null``: its mean over all permutations of the images of Y, exactly
      tr(X^T X) tr(Y^T Y) / ((n - 1) ||X^T X||_F ||Y^T Y||_F);
    - ``cka_debiased``: the same ratio of unbiased estimates; the mean of its numerator over
      permutations is 0;
    - ``procrustes`` = min_R ||X - Y R||_F^2 of X and Y scaled to norm 1, 2 - 2 ||X^T Y||_*, 0
      (equal up to rotation and scale) .. 2;
    - ``procrustes_null``: the same for one draw of a Gaussian matrix with the second moments that
      X^T P Y has over random permutations P, (X^T X)^(1/2) Z (Y^T Y)^(1/2) / sqrt(n - 1).
    """
    sets = len(widths)
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    trace = torch.stack([centred[part, part].diagonal().sum() for part in parts])
    roots = [torch.linalg.eigvalsh(centred[part, part]).clamp(min=0).sqrt() for part in parts]
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(max(widths), max(widths), generator=generator, dtype=torch.float64)
    gauss = gauss.to(centred.device)
    product, nuclear, random = (centred.new_zeros(sets, sets) for _ in range(3))
    for i in range(sets):
        for j in range(i, sets):
            cross = centred[parts[i], parts[j]]
            drawn = roots[i][:, None] * gauss[: widths[i], : widths[j]] * roots[j]
            drawn = drawn / math.sqrt(max(n - 1, 1))
            product[i, j] = product[j, i] = cross.square().sum()
            nuclear[i, j] = nuclear[j, i] = torch.linalg.svdvals(cross).sum()
            random[i, j] = random[j, i] = torch.linalg.svdvals(drawn).sum()
    scale = _geometric_means(trace)
    traces = trace[:, None] * trace
    cka_null = unbiased = torch.full_like(product, torch.nan)
    if n > 1:
        cka_null = traces / _geometric_means(product.diagonal()) / (n - 1)
    if n > 3:
        unbiased = product - squares * n / (n - 2) + traces / ((n - 1) * (n - 2))
    return {
        "cka": product / _geometric_means(product.diagonal()),
        "cka_null": cka_null,
        "cka_debiased": unbiased / _geometric_means(unbiased.diagonal()),
        "procrustes": (2 - 2 * nuclear / scale).clamp(min=0),
        "procrustes_null": (2 - 2 * random / scale).clamp(min=0),
    }


def _geometric_means(values: Float[Tensor, " sets"]) -> Float[Tensor, "sets sets"]:
    """``sqrt(a_i a_j)``; nan where one is not positive."""
    roots = torch.where(values > 0, values, torch.nan).sqrt()
    return roots[:, None] * roots
