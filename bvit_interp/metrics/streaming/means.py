"""Streamed means with confidence intervals, and mean correlations of maps.

Each is a `torchmetrics.Metric` that keeps sums in float64, so memory is constant and any number of
processes can take part.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.metrics.statistics import Z_95


class MeanCI(Metric):
    """Mean of each number over images, with a normal 95 % confidence interval; nan is left out.

    Parameters
    ----------
    *shape : shape of the numbers of one image.

    Returns
    -------
    ``compute``: `value` (the mean), `low` and `high` (the mean -+ 1.96 standard errors over images;
    nan for fewer than two images) and `n` (the images that have a number), each of `shape`.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    square: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name in ("count", "total", "square"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Shaped[Tensor, " batch *shape"]) -> None:
        """Add the numbers of a batch of images."""
        present = ~values.isnan()
        filled = torch.where(present, values.double(), 0.0)
        self.count += present.sum(0)
        self.total += filled.sum(0)
        self.square += filled.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Means over all images and processes, on the CPU."""
        mean = self.total / self.count
        variance = (self.square - self.total * mean).clamp(min=0) / (self.count - 1)
        half = Z_95 * (variance / self.count).sqrt()
        half = torch.where(self.count > 1, half, torch.nan)
        found = {"value": mean, "low": mean - half, "high": mean + half, "n": self.count.long()}
        return {key: tensor.cpu() for key, tensor in found.items()}


class MapCorrelations(Metric):
    """Mean correlation of the maps of every pair of (step, head), within and between images.

    The second mean is over all ordered pairs of different images, exactly and in constant memory:
    the sum of all inner products is the inner product of the sums.

    Parameters
    ----------
    steps, heads, patches : T, H and P of the maps.

    Returns
    -------
    ``compute``: `same_image` and `other_images`, each ``(T, H, T, H)``; nan where no pair of maps
    varies.
    """

    full_state_update = False
    products: Tensor
    pairs: Tensor
    maps: Tensor
    count: Tensor

    def __init__(self, steps: int, heads: int, patches: int) -> None:
        super().__init__()
        self.steps, self.heads = steps, heads
        m = steps * heads
        shapes = {"products": (m, m), "pairs": (m, m), "maps": (m, patches), "count": (m,)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, maps: Float64[Tensor, "batch steps heads patches"]) -> None:
        """Add a batch of `metrics.unit_maps`; a map of zeros is left out."""
        maps = maps.flatten(1, 2)
        varies = maps.any(-1).double()
        by_map = maps.transpose(0, 1).flatten(1)
        self.products += by_map @ by_map.T
        self.pairs += varies.T @ varies
        self.maps += maps.sum(0)
        self.count += varies.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Mean correlations over all images and processes, on the CPU."""
        between = self.maps @ self.maps.T - self.products
        other_pairs = torch.outer(self.count, self.count) - self.pairs
        found = {
            "same_image": _mean(self.products, self.pairs),
            "other_images": _mean(between, other_pairs),
        }
        shape = (self.steps, self.heads, self.steps, self.heads)
        return {key: tensor.reshape(shape).cpu() for key, tensor in found.items()}


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """Total over count; nan where nothing was counted."""
    return torch.where(count > 0, total / count, torch.nan)
