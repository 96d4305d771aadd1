"""Means over images: with their intervals, and of how maps correlate within an image and between
images.

Each is a `torchmetrics.Metric` of sums in float64: constant memory, any number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.metrics.statistics import Z_95


class MeanCI(Metric):
    """Mean of each number over images, with a normal 95 % interval; nan is left out.

    Parameters
    ----------
    *shape : of the numbers of one image.

    Returns
    -------
    ``compute``: `value`, `low`, `high` (mean, and mean -+ 1.96 standard errors over images; nan
    below two images) and `n` images that count, each of `shape`.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    square: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name in ("count", "total", "square"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add a batch ``(B, *shape)``."""
        there = ~values.isnan()
        filled = torch.where(there, values.double(), 0.0)
        self.count += there.sum(0)
        self.total += filled.sum(0)
        self.square += filled.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Means over all images, on the CPU."""
        mean = self.total / self.count
        variance = (self.square - self.total * mean).clamp(min=0) / (self.count - 1)
        half = Z_95 * (variance / self.count).sqrt()
        half = torch.where(self.count > 1, half, torch.nan)
        found = {"value": mean, "low": mean - half, "high": mean + half, "n": self.count.long()}
        return {key: tensor.cpu() for key, tensor in found.items()}


class MapPairs(Metric):
    """How the maps of every two (step, head) correlate: in one image, and between different images.

    The second mean is over all ordered pairs of different images, exactly and in constant memory:
    the sum of all inner products is the inner product of the sums.

    Parameters
    ----------
    steps, heads, places : T, H and patches P of the maps.

    Returns
    -------
    ``compute``: `same_image` and `other_images`, each ``(T, H, T, H)``; nan where no pair of maps
    varies.
    """

    full_state_update = False
    cross: Tensor
    pairs: Tensor
    maps: Tensor
    seen: Tensor

    def __init__(self, steps: int, heads: int, places: int) -> None:
        super().__init__()
        self.steps, self.heads = steps, heads
        m = steps * heads
        for name, shape in (
            ("cross", (m, m)),
            ("pairs", (m, m)),
            ("maps", (m, places)),
            ("seen", (m,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, maps: Tensor) -> None:
        """Add a batch of `metrics.unit_maps` ``(B, T, H, P)``; a map of zeros is left out."""
        maps = maps.flatten(1, 2)
        seen = maps.any(-1).double()
        by_map = maps.transpose(0, 1).flatten(1)
        self.cross += by_map @ by_map.T
        self.pairs += seen.T @ seen
        self.maps += maps.sum(0)
        self.seen += seen.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Mean correlations over all images, on the CPU."""
        between = self.maps @ self.maps.T - self.cross
        found = {
            "same_image": _over(self.cross, self.pairs),
            "other_images": _over(between, torch.outer(self.seen, self.seen) - self.pairs),
        }
        shape = (self.steps, self.heads, self.steps, self.heads)
        return {key: tensor.reshape(shape).cpu() for key, tensor in found.items()}


def _over(total: Tensor, count: Tensor) -> Tensor:
    """Quotient; nan, not infinity, over nothing."""
    return torch.where(count > 0, total / count, torch.nan)
