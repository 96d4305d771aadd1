"""Streaming statistics of activations: constant memory, any number of processes.

Each is a `torchmetrics.Metric` whose `update` takes activations ``(B, T, ...)`` (and labels where
named), so that `Probe.collect` and torchmetrics' own metrics mix. Sums are kept in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from bvit_interp.errors import UserError


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise UserError("activations hold NaN or infinite values")
    return values.double()


class MeanByClass(Metric):
    """Mean activation of each class.

    Parameters
    ----------
    num_classes : classes C; labels are 0..C-1.

    Returns
    -------
    ``compute``: ``(C, T, ...)`` float64; nan for a class without images.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state(
            "total", torch.zeros(num_classes, 1, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("count", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.shape: tuple[int, ...] | None = None

    def update(self, values: Tensor, labels: Tensor) -> None:
        """Add a batch: values ``(B, T, ...)``, labels ``(B,)``."""
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UserError(
                f"labels must be 0..{self.num_classes - 1}, got {labels.min()}..{labels.max()}"
            )
        flat = _finite(values).flatten(1)
        if self.shape is None:
            self.shape = tuple(values.shape[1:])
            self.total = self.total.expand(-1, flat.shape[1]).clone()
        self.total.index_add_(0, labels, flat)
        self.count += torch.bincount(labels, minlength=self.num_classes)

    def compute(self) -> Tensor:
        """Class means ``(C, T, ...)``."""
        means = self.total / self.count[:, None]
        return means if self.shape is None else means.unflatten(1, self.shape)

    def reset(self) -> None:
        super().reset()
        self.shape = None


class Gram(Metric):
    """Second moments of one token over a data set, per step: what its singular values need.

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
        self.add_state(
            "gram", torch.zeros(steps, width, width, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state(
            "total", torch.zeros(steps, width, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add a batch of activations ``(B, T, D)``."""
        by_step = _finite(values).transpose(0, 1)
        self.gram += by_step.mT @ by_step
        self.total += by_step.sum(1)
        self.count += values.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """`gram` = X^T X ``(T, D, D)``, `centred` = the same about the mean, `count` = rows of
        X."""
        mean = self.total / self.count
        return {
            "gram": self.gram,
            "centred": self.gram - self.count * mean[:, :, None] * mean[:, None, :],
            "count": self.count,
        }


class PerImage(Metric):
    """One row of numbers an image, put back into the data set's order whatever process saw it.

    Returns
    -------
    ``compute``: positions ``(n,)`` and rows ``(n, columns)`` float64, sorted by position.
    """

    full_state_update = False
    index: list[Tensor]
    rows: list[Tensor]  # flat: a process without images need not know the columns

    def __init__(self) -> None:
        super().__init__()
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, index: Tensor, rows: Tensor) -> None:
        """Add positions ``(B,)`` and rows ``(B, columns)``; nan is allowed and kept."""
        self.index.append(index)
        self.rows.append(rows.double().flatten())

    def compute(self) -> tuple[Tensor, Tensor]:
        """All rows in order."""
        index, rows = dim_zero_cat(self.index), dim_zero_cat(self.rows)
        order = index.argsort()
        return index[order].cpu(), rows.reshape(len(index), -1 if len(index) else 0)[order].cpu()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Before every gather: a process without rows takes part with none, in the others'
        dtypes."""
        if not len(self.index):
            self.index = [torch.empty(0, dtype=torch.int64, device=self.device)]
            self.rows = [torch.empty(0, dtype=torch.float64, device=self.device)]
        super().sync(*args, **kwargs)
