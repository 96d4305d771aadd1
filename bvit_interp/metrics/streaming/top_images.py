"""Top-k images of every neuron of every step, streamed in constant memory."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite

_VALUE, _IMAGE, _PATCH = range(3)


class TopImages(Metric):
    """The k largest values of every step and neuron, with the image and the patch of each.

    Parameters
    ----------
    steps, neurons : number of steps T and of neurons F.
    k : number of images to keep.

    Returns
    -------
    ``compute``: `values` ``(T, F, k)`` float64, largest first; `images` and `patches` ``(T, F, k)``
    int64. Where fewer than k images were seen: -inf, -1 and -1. Among equal values, the image with
    the lower number comes first, whichever process saw it.

    Raises
    ------
    UserError
        For k below 1, and for values that are NaN or infinite.
    """

    full_state_update = False
    best: Tensor  # (T, F, k, 3): value, image, patch in one state, so that a gather merges them

    def __init__(self, steps: int, neurons: int, k: int) -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"top-k images need k >= 1, got {k}")
        self.k = k
        empty = torch.tensor([-torch.inf, -1, -1], dtype=torch.float64)
        self.add_state(
            "best", empty.repeat(steps, neurons, k, 1), dist_reduce_fx=partial(_merge, k=k)
        )

    def update(
        self,
        values: Float[Tensor, "batch steps neurons"],
        patches: Int[Tensor, "batch steps neurons"],
        index: Int[Tensor, " batch"],
    ) -> None:
        """Add a batch.

        Parameters
        ----------
        values : one value per image, step and neuron.
        patches : the patch that goes with each value.
        index : numbers of the images.
        """
        check_finite(values)
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


def _merge(
    lists: Float[Tensor, "processes steps neurons k 3"], k: int
) -> Float[Tensor, "steps neurons k 3"]:
    """One list from the lists of all processes."""
    return _largest(lists.movedim(0, 2).flatten(2, 3), k)


def _largest(
    entries: Float[Tensor, "steps neurons entries 3"], k: int
) -> Float[Tensor, "steps neurons kept 3"]:
    """The first k entries, by decreasing value, then by increasing image number."""
    by_image = entries[..., _IMAGE].argsort(dim=2)
    entries = entries.take_along_dim(by_image[..., None], dim=2)
    by_value = entries[..., _VALUE].argsort(dim=2, descending=True, stable=True)[:, :, :k]
    return entries.take_along_dim(by_value[..., None], dim=2)
