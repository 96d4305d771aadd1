"""How much a neuron's answer to the images varies, and how much of it stays from one step to the
next.

A neuron's profile at a step is its activation, mean over the patches, as a function of the image.
Streamed as sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import Address

ANSWERS = 0.1


def answers(probe: Probe, images: Tensor) -> tuple[Tensor, Tensor]:
    """Profiles and peaks of every neuron at every step; no activation outlives its step.

    Parameters
    ----------
    images : ``(B, 3, height, width)``, normalised.

    Returns
    -------
    Mean of `mlp_post` over the patches, and the patch where it is largest (row by row from 0), both
    ``(B, T, F)``.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def reduce(mlp_post: Tensor, address: Address) -> None:
        patches = mlp_post[:, probe.num_prefix_tokens :]
        found[address.step] = patches.mean(1), patches.argmax(1)

    steps = range(1, probe.num_steps + 1)
    with torch.inference_mode(), probe.edit({("mlp_post", step): reduce for step in steps}):
        probe(images.to(next(probe.model.parameters()).device))
    means, peaks = (torch.stack([found[step][i] for step in steps], dim=1) for i in range(2))
    return means, peaks


def from_steady_to_changing(profile: Mapping[str, Tensor], count: int) -> list[int]:
    """Neurons at even quantiles of the change, of a `StepProfiles`, among those that answer at
    every step: whose spread is above `ANSWERS` of the step's median. One alone is the median.

    Raises
    ------
    UserError
        If fewer answer.
    """
    spread, change = profile["spread"], profile["change"]
    answering = (spread > ANSWERS * spread.median(1, keepdim=True).values).all(0).nonzero()[:, 0]
    if len(answering) < count:
        raise UserError(
            f"{len(answering)} neurons answer differently to different images at every step, not {count}"
        )
    ranked = answering[change[answering].argsort(stable=True)].cpu()
    places = (
        torch.linspace(0, len(ranked) - 1, count) if count > 1 else torch.tensor([len(ranked) // 2])
    )
    return ranked[places.round().long()].tolist()


class StepProfiles(Metric):
    """Spread of every neuron's profile at every step, and its correlation with the next step's.

    Parameters
    ----------
    steps, neurons : T, F.

    Returns
    -------
    ``compute``: `spread` ``(T, F)``, standard deviation over the images, and `correlation` ``(T -
    1, F)`` with the next step, over the images (Pearson's; nan where a spread is zero); `change`
    ``(F,)``, 1 - the mean of it over the steps, 0..2; float64; and `count`, images.

    Raises
    ------
    UserError
        For values that are not finite.
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
            self.add_state(
                name, torch.zeros(rows, neurons, dtype=torch.float64), dist_reduce_fx="sum"
            )

    def update(self, values: Tensor) -> None:
        """Add a batch ``(B, T, F)``."""
        if not torch.isfinite(values).all():
            raise UserError("activations hold NaN or infinite values")
        values = values.double()
        self.count += len(values)
        self.total += values.sum(0)
        self.squares += values.square().sum(0)
        self.products += (values[:, :-1] * values[:, 1:]).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """`spread`, `correlation`, `change` and `count`."""
        mean = self.total / self.count
        power = self.squares / self.count
        variance = power - mean.square()
        variance = variance.where(
            variance > 1e-12 * power, 0
        )  # rounding of large numbers' difference is no spread
        covariance = self.products / self.count - mean[:-1] * mean[1:]
        both = (variance[:-1] * variance[1:]).sqrt()
        correlation = (covariance / both).clamp(-1, 1).where(both > 0, torch.nan)
        change = 1 - correlation.mean(0)
        return {
            "count": self.count,
            "spread": variance.sqrt(),
            "correlation": correlation,
            "change": change,
        }
