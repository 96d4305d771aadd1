"""Streamed statistics of activations: Gram matrices, one row per image.

Each is a `torchmetrics.Metric`, so any number of processes can take part. `Gram` takes activations
``(B, T, D)``, as `Probe.collect` gives them to this and to torchmetrics' own metrics; it keeps sums
in float64, in constant memory.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from bvit_interp.metrics.checks import check_finite


class Gram(Metric):
    """Second moments of one token over a data set, per step: its singular values follow from them.

    Parameters
    ----------
    steps : number of steps T.
    width : D.
    """

    full_state_update = False
    gram: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        empty = torch.zeros(steps, width, width, dtype=torch.float64)
        self.add_state("gram", empty, dist_reduce_fx="sum")
        self.add_state("total", empty[:, 0].clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Float[Tensor, "batch steps width"]) -> None:
        """Add a batch of activations."""
        by_step = check_finite(values).double().transpose(0, 1)
        self.gram += by_step.mT @ by_step
        self.total += by_step.sum(1)
        self.count += values.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """`gram` = X^T X ``(T, D, D)``, `centred` = that about the mean, `count` = rows of X."""
        mean = self.total / self.count
        return {
            "gram": self.gram,
            "centred": self.gram - self.count * mean[:, :, None] * mean[:, None, :],
            "count": self.count,
        }


class PerImage(Metric):
    """One row of numbers per image, in the order of the data set, whichever process saw the image.

    Returns
    -------
    ``compute``: positions ``(n,)`` and rows ``(n, columns)`` float64, sorted by position.
    """

    full_state_update = False
    index: list[Tensor]
    rows: list[Tensor]  # flat: a process without images need not know the number of columns

    def __init__(self) -> None:
        super().__init__()
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, index: Int[Tensor, " batch"], rows: Shaped[Tensor, "batch columns"]) -> None:
        """Add the rows of images at these positions; nan is allowed and kept."""
        self.index.append(index)
        self.rows.append(rows.double().flatten())

    def compute(self) -> tuple[Tensor, Tensor]:
        """All rows in order, on the CPU."""
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        order = index.argsort()
        return index[order].cpu(), rows.reshape(len(index), -1 if len(index) else 0)[order].cpu()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather; a process without rows takes part with empty tensors of the others' dtypes."""
        if not len(self.index):
            self.index = [torch.empty(0, dtype=torch.int64, device=self.device)]
            self.rows = [torch.empty(0, dtype=torch.float64, device=self.device)]
        super().sync(*args, **kwargs)
