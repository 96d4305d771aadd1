"""The states of one token of every image, kept for an embedding.

An embedding cannot stream: n images x T steps x D numbers of four bytes are kept, 0.37 GB for
10,000 images of bViT-B at 12 steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite

_DTYPES = {"index": torch.int64, "labels": torch.int64, "states": torch.float32}


class StateTable(Metric):
    """States of images, in the order of the data set whatever process saw them.

    Parameters
    ----------
    steps, width : T and D.

    Returns
    -------
    ``compute``: positions ``(n,)`` int64, labels ``(n,)`` int64 and states ``(n, T, D)`` float32,
    sorted by position.

    Raises
    ------
    UserError
        For states of another shape, and for NaN or infinite values.
    """

    full_state_update = False
    index: list[Tensor]
    labels: list[Tensor]
    states: list[Tensor]  # flat, because a gather over processes needs a single axis

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.shape = (steps, width)
        for name in _DTYPES:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        index: Int[Tensor, " batch"],
        labels: Int[Tensor, " batch"],
        states: Float[Tensor, "batch steps width"],
    ) -> None:
        """Add positions, labels and states of a batch."""
        if tuple(states.shape[1:]) != self.shape:
            raise UserError(
                f"states must be (B, T, D) = {(len(index), *self.shape)}, got {tuple(states.shape)}"
            )
        self.index.append(index.to(self.device))
        self.labels.append(labels.to(self.device))
        self.states.append(check_finite(states).float().flatten().to(self.device))

    def compute(
        self,
    ) -> tuple[
        Int[np.ndarray, " images"],
        Int[np.ndarray, " images"],
        Float[np.ndarray, "images steps width"],
    ]:
        """All of them in order; in numpy, because torchmetrics squeezes tensors of one number."""
        index, labels = dim_zero_cat(self.index).cpu(), dim_zero_cat(self.labels).cpu()
        states = dim_zero_cat(self.states).cpu().reshape(len(index), *self.shape)
        order = index.argsort()
        return index[order].numpy(), labels[order].numpy(), states[order].numpy()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Before every gather: a process without images sends empty tensors of the right dtypes."""
        if not len(self.index):
            for name, dtype in _DTYPES.items():
                setattr(self, name, [torch.empty(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)
