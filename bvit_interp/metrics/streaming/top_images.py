"""The images that make each neuron of each step fire most, and where: a streamed list of constant
length."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError

_VALUE, _IMAGE, _PATCH = range(3)


class TopList(Metric):
    """The k largest values of every (step, neuron), with the image and the patch of each.

    Parameters
    ----------
    steps, neurons : T, F.
    k : entries kept.

    Returns
    -------
    ``compute``: values ``(T, F, k)`` float64, largest first, images and patches ``(T, F, k)``
    int64; where fewer than k images were seen, -inf, -1 and -1. Of equal values the image of the
    lower number comes first, whichever process saw it.

    Raises
    ------
    UserError
        For k below 1, and values that are not finite.
    """

    full_state_update = False
    best: Tensor  # one state of (value, image, patch), so that a gather merges the three together

    def __init__(self, steps: int, neurons: int, k: int) -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"a list needs at least one entry, got {k}")
        self.k = k
        empty = torch.tensor([-torch.inf, -1, -1], dtype=torch.float64)
        self.add_state(
            "best", empty.repeat(steps, neurons, k, 1), dist_reduce_fx=partial(_merged, k=k)
        )

    def update(self, values: Tensor, patches: Tensor, index: Tensor) -> None:
        """Add a batch: values and patches ``(B, T, F)``, numbers of the images ``(B,)``."""
        if not torch.isfinite(values).all():
            raise UserError("activations hold NaN or infinite values")
        images = index.to(values.device)[:, None, None].expand_as(values)
        batch = torch.stack([part.double() for part in (values, images, patches)], dim=-1)
        self.best = _largest(torch.cat([self.best, batch.movedim(0, 2)], dim=2), self.k)

    def compute(self) -> dict[str, Tensor]:
        """`values`, `images` and `patches`."""
        return {
            "values": self.best[..., _VALUE],
            "images": self.best[..., _IMAGE].long(),
            "patches": self.best[..., _PATCH].long(),
        }


def _merged(lists: Tensor, k: int) -> Tensor:
    """One list of the W processes' ``(W, T, F, k, 3)``."""
    return _largest(lists.movedim(0, 2).flatten(2, 3), k)


def _largest(entries: Tensor, k: int) -> Tensor:
    """The first k of entries ``(T, F, n, 3)``, by falling value and rising image."""
    by_image = entries[..., _IMAGE].argsort(dim=2)
    entries = entries.take_along_dim(by_image[..., None], dim=2)
    by_value = entries[..., _VALUE].argsort(dim=2, descending=True, stable=True)[:, :, :k]
    return entries.take_along_dim(by_value[..., None], dim=2)
