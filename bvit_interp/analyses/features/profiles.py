"""Response profiles of neurons: spread over images, change between steps.

The response of a neuron to an image at a step is its activation, mean over the patches. Its profile
at the step is the response as a function of the image. Sums over the images are streamed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import Address

MIN_RELATIVE_SPREAD = 0.1
"""Least spread of a responsive neuron, as a share of the median of the step."""


def responses(
    probe: Probe, images: Float[Tensor, "batch channels height width"]
) -> tuple[Float[Tensor, "batch steps neurons"], Int[Tensor, "batch steps neurons"]]:
    """Response and peak of every neuron at every step; no activation outlives its step.

    Parameters
    ----------
    images : normalised, on the model's device.

    Returns
    -------
    Mean of `mlp_post` over the patches, and the patch where it is largest (row by row from 0).
    """
    means: dict[int, Tensor] = {}
    peaks: dict[int, Tensor] = {}

    def reduce(mlp_post: Tensor, address: Address) -> None:
        patches = mlp_post[:, probe.num_prefix_tokens :]
        means[address.step], peaks[address.step] = patches.mean(1), patches.argmax(1)

    steps = range(1, probe.num_steps + 1)
    with torch.inference_mode(), probe.edit({("mlp_post", step): reduce for step in steps}):
        probe(images)
    return (
        torch.stack([means[step] for step in steps], dim=1),
        torch.stack([peaks[step] for step in steps], dim=1),
    )


def select_neurons(profiles: Mapping[str, Tensor], count: int) -> list[int]:
    """Neurons from the least to the most changing, evenly spaced in rank; one alone is the median.

    Only neurons that respond at every step are selected: their spread is above
    `MIN_RELATIVE_SPREAD` of the step's median.

    Parameters
    ----------
    profiles : what `ResponseProfiles` computes.
    count : how many.

    Raises
    ------
    UserError
        If fewer neurons respond.
    """
    spread, change = profiles["spread"], profiles["correlation_distance"]
    least = MIN_RELATIVE_SPREAD * spread.median(1, keepdim=True).values
    responsive = (spread > least).all(0).nonzero()[:, 0]
    if len(responsive) < count:
        raise UserError(
            f"{len(responsive)} neurons respond differently to different images at every step,"
            f" not {count}"
        )
    ranked = responsive[change[responsive].argsort(stable=True)].cpu()
    if count == 1:
        return [int(ranked[len(ranked) // 2])]
    ranks = torch.linspace(0, len(ranked) - 1, count).round().long()
    return ranked[ranks].tolist()


class ResponseProfiles(Metric):
    """Spread of every neuron's profile at every step, and its correlation with the next step's.

    Parameters
    ----------
    steps, neurons : number of steps T and of neurons F.

    Returns
    -------
    ``compute``: `spread` ``(T, F)``, standard deviation over the images; `correlation` ``(T - 1,
    F)``, Pearson's with the next step over the images (nan where a spread is zero);
    `correlation_distance` ``(F,)``, 1 - the mean of it over the steps, 0..2; all float64. `count`,
    number of images.

    Raises
    ------
    UserError
        For values that are NaN or infinite.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor
    products: Tensor

    def __init__(self, steps: int, neurons: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name, rows in (("total", steps), ("squares", steps), ("products", steps - 1)):
            zeros = torch.zeros(rows, neurons, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, values: Float[Tensor, "batch steps neurons"]) -> None:
        """Add the responses to a batch of images."""
        values = check_finite(values).double()
        self.count += len(values)
        self.total += values.sum(0)
        self.squares += values.square().sum(0)
        self.products += (values[:, :-1] * values[:, 1:]).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """`spread`, `correlation`, `correlation_distance` and `count`."""
        mean = self.total / self.count
        power = self.squares / self.count
        variance = power - mean.square()
        # the rounding error of a difference of large numbers is no spread
        variance = variance.where(variance > 1e-12 * power, 0)
        covariance = self.products / self.count - mean[:-1] * mean[1:]
        scale = (variance[:-1] * variance[1:]).sqrt()
        correlation = (covariance / scale).clamp(-1, 1).where(scale > 0, torch.nan)
        return {
            "count": self.count,
            "spread": variance.sqrt(),
            "correlation": correlation,
            "correlation_distance": 1 - correlation.mean(0),
        }
