"""Mean inner products within an image, and between different images."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor
from torchmetrics import Metric


class ImagePairs(Metric):
    """Mean inner product of a vector of an image with one of the same image, and of another image.

    The second mean is over all ordered pairs of different images, exactly and in constant memory:
    the sum of all inner products is the inner product of the sums.

    Parameters
    ----------
    steps, width : T, and K of the vectors.

    Returns
    -------
    ``compute``: `same_image` and `other_images`, ``(T,)`` on the CPU; the second is nan for fewer
    than two images.
    """

    full_state_update = False
    n: Tensor
    one: Tensor
    other: Tensor
    same: Tensor

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        for name, shape in (
            ("n", ()),
            ("one", (width,)),
            ("other", (steps, width)),
            ("same", (steps,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, one: Shaped[Tensor, "batch width"], other: Shaped[Tensor, "batch steps width"]
    ) -> None:
        """Add a batch: one vector per image, and one per image and step."""
        one, other = one.double(), other.double()
        self.n += len(one)
        self.one += one.sum(0)
        self.other += other.sum(0)
        self.same += torch.einsum("bk,btk->t", one, other)

    def compute(self) -> dict[str, Tensor]:
        """Both means over all processes."""
        pairs = self.n * (self.n - 1)
        between = torch.where(pairs > 0, (self.other @ self.one - self.same) / pairs, torch.nan)
        return {"same_image": (self.same / self.n).cpu(), "other_images": between.cpu()}
