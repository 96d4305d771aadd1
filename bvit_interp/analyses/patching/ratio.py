"""A ratio of two means over images, with its interval."""

from __future__ import annotations

import torch
from jaxtyping import Real
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.statistics import Z_95


class RatioOfMeans(Metric):
    """Mean gain over mean whole, with a 95 % interval by the delta method.

    A mean of each image's own ratio would be dominated by images whose whole is near zero.

    Parameters
    ----------
    *shape : shape of the gains of one image.

    Returns
    -------
    ``compute``: `value` = mean gain / mean whole; `low` and `high`, ``value -+ 1.96 sd(gain - value
    whole) / (sqrt(n) |mean whole|)``; each of `shape`. They are nan if the mean whole is zero, the
    interval also for fewer than two images. `n` is the number of images.

    References
    ----------
    Cochran (1977), Sampling techniques, ch. 6 (ratio estimators).
    """

    full_state_update = False
    count: Tensor
    gain: Tensor
    whole: Tensor
    gain_square: Tensor
    product: Tensor
    whole_square: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("gain", "whole", "gain_square", "product", "whole_square"):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gain: Real[Tensor, "batch ..."], whole: Real[Tensor, "#batch ..."]) -> None:
        """Add a batch of gains ``(B, *shape)`` and wholes, of that shape or broadcast to it.

        Raises
        ------
        ValueError
            For gains of another shape.
        UserError
            For NaN or infinite values.
        """
        if gain.shape[1:] != self.shape:
            raise ValueError(f"gains of shape {self.shape} per image, got {tuple(gain.shape[1:])}")
        gain = check_finite(gain.double(), "logits")
        whole = check_finite(whole.double(), "logits").expand_as(gain)
        self.count += len(gain)
        self.gain += gain.sum(0)
        self.whole += whole.sum(0)
        self.gain_square += gain.square().sum(0)
        self.product += (gain * whole).sum(0)
        self.whole_square += whole.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """The ratios over all images, on the CPU."""
        ratio = torch.where(self.whole != 0, self.gain / self.whole, torch.nan)
        residual = self.gain_square - 2 * ratio * self.product + ratio.square() * self.whole_square
        deviation = (residual.clamp(min=0) * self.count / (self.count - 1)).sqrt()
        half = torch.where(self.count > 1, Z_95 * deviation / self.whole.abs(), torch.nan)
        table = {"value": ratio, "low": ratio - half, "high": ratio + half, "n": self.count.long()}
        return {key: values.cpu() for key, values in table.items()}
