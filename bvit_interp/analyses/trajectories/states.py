"""The states of one token of every image, kept as they are: for what cannot stream, such as an
embedding.

n images x T steps x D numbers of four bytes: 10,000 images of bViT-B at 12 steps are 0.37 GB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from bvit_interp.errors import UserError


class StateTable(Metric):
    """States ``(B, T, D)`` of images, put back into the data set's order whatever process saw them.

    Parameters
    ----------
    steps, width : T and D.

    Returns
    -------
    ``compute``: positions ``(n,)`` int64, labels ``(n,)`` int64 and states ``(n, T, D)`` float32,
    sorted by position.
    """

    full_state_update = False
    index: list[Tensor]
    labels: list[Tensor]
    states: list[Tensor]  # flat, as a gather of several processes wants one axis

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.shape = (steps, width)
        self.dtypes = {"index": torch.int64, "labels": torch.int64, "states": torch.float32}
        for name in self.dtypes:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, index: Tensor, labels: Tensor, states: Tensor) -> None:
        """Add positions ``(B,)``, labels ``(B,)`` and states ``(B, T, D)``."""
        if tuple(states.shape) != (len(index), *self.shape):
            raise UserError(
                f"states must be (B, T, D) = {(len(index), *self.shape)}, got {tuple(states.shape)}"
            )
        if not torch.isfinite(states).all():
            raise UserError("activations hold NaN or infinite values")
        self.index.append(index.to(self.device))
        self.labels.append(labels.to(self.device))
        self.states.append(states.float().flatten().to(self.device))

    def compute(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All of them in order; numpy's, as torchmetrics would squeeze tensors of one number."""
        index, labels = dim_zero_cat(self.index).cpu(), dim_zero_cat(self.labels).cpu()
        states = dim_zero_cat(self.states).cpu().reshape(len(index), *self.shape)
        order = index.argsort()
        return index[order].numpy(), labels[order].numpy(), states[order].numpy()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Before every gather: a process without images takes part with none, in the others'
        dtypes."""
        if not len(self.index):
            for name, dtype in self.dtypes.items():
                setattr(self, name, [torch.empty(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)
