"""Per-step gradients of a data set, streamed into sums over folds."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.analyses.step_attribution.untied import Layout
from bvit_interp.errors import UserError

MAX_BYTES = 2**34  # of the sums kept


class FoldGradients(Metric):
    """Terms of the gradient summed over the images of each fold, in float64.

    Parameters
    ----------
    folds, steps, weights : F, T and P; F T P numbers of 8 bytes are kept.

    Returns
    -------
    ``compute``: sums ``(F, T, P)`` and images ``(F,)``, float64.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, folds: int, steps: int, weights: int) -> None:
        super().__init__()
        if (held := 8 * folds * steps * weights) > MAX_BYTES:
            raise UserError(
                f"sums of {folds} folds of images would take {held / 2**30:.0f} GiB: use fewer"
                " folds"
            )
        total = torch.zeros(folds, steps, weights, dtype=torch.float64)
        self.add_state("total", total, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(folds, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, fold: int, terms: Float[Tensor, "steps weights"], images: int) -> None:
        """Add terms that are summed over `images` of one fold."""
        self.total[fold] += terms
        self.count[fold] += images

    def compute(self) -> tuple[Float[Tensor, "folds steps weights"], Float[Tensor, " folds"]]:
        """The sums of all processes."""
        if not self.count.all():
            raise UserError("a fold of the images is empty: use more images or fewer folds")
        return self.total, self.count


def mean_of_halves(
    total: Float[Tensor, "folds steps weights"],
    count: Float[Tensor, " folds"],
    without: int | None = None,
) -> tuple[Float[Tensor, "2 steps weights"], Float[Tensor, " 2"]]:
    """Mean terms over the even folds and over the odd folds, and their numbers of images.

    Parameters
    ----------
    total, count : of `FoldGradients`.
    without : a fold to leave out.
    """
    halves = [[fold for fold in range(half, len(total), 2) if fold != without] for half in (0, 1)]
    images = torch.stack([count[folds].sum() for folds in halves])
    return torch.stack([total[folds].sum(0) for folds in halves]) / images[:, None, None], images


def sampling_norm(
    total: Float[Tensor, "folds steps weights"], count: Float[Tensor, " folds"], layout: Layout
) -> Float[Tensor, "steps layers"]:
    """Norm of each layer's mean gradient that the choice of images alone would give.

    It is the standard error over folds, ``sqrt(sum_f ||g_f - g||^2 / (F (F - 1)))``, with g_f the
    mean of a fold: the expected norm if the true gradient were zero.
    """
    folds, mean = len(total), total.sum(0) / count.sum()
    squares = torch.zeros(total.shape[1], len(layout.slices), dtype=total.dtype)
    squares = squares.to(total.device)
    for of_fold, images in zip(total, count, strict=True):
        deviation = (of_fold / images - mean).square()
        squares += torch.stack([deviation[:, each].sum(1) for each in layout.slices], 1)
    return (squares / (folds * (folds - 1))).sqrt()
