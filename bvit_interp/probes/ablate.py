"""Ablating heads and neurons: zero, mean and resample ablation, many variants of a batch at once.

Zero ablation silences a unit, mean ablation leaves what it does on average, resample ablation gives
it what it does on another image (Chan et al., 2022, "Causal scrubbing"). A batch is repeated V
times along its first axis (`State.repeated`), and variant v keeps the units of row v; the edit is
one for a site and a step, so the run can start from the state before it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Edit
from bvit_interp.vocabulary import Address, unit_axis

SITES_OF_UNITS = {"head": "z", "neuron": "mlp_post"}
"""Where a unit is ablated: heads before the projection, neurons after GELU."""


def ablate(keep: Tensor, fill: Tensor | None = None) -> Edit:
    """An edit of `z` or `mlp_post` that ablates the units of every variant.

    Parameters
    ----------
    keep : ``(V, U)``, 1 or True for a unit that is kept; U heads or neurons. Values between mix; a
        gradient goes through a `keep` of floats.
    fill : what the others become: None for zero; a mean ``(N, ...)`` or each image's own ``(B, N,
        ...)``, in the shape of the site.

    Returns
    -------
    fn(activation ``(V B, N, ...)``, address) -> the same with variant v's units ablated.
    """

    def edit(activation: Tensor, address: Address) -> Tensor:
        variants = activation.unflatten(0, (len(keep), -1))
        shape = (
            (len(keep), 1, 1, -1, 1) if unit_axis(address.site) == "H" else (len(keep), 1, 1, -1)
        )
        share = keep.to(activation.dtype).reshape(shape)
        if fill is None:
            return (variants * share).flatten(0, 1)
        return torch.lerp(fill.to(activation.dtype).expand_as(variants), variants, share).flatten(
            0, 1
        )

    return edit


def neuron_groups(neurons: int, groups: int) -> Tensor:
    """The group ``(F,)`` int64 of every neuron: `groups` runs of neighbours, their sizes within one
    of each other."""
    return torch.arange(neurons) * groups // neurons


class SiteMeans(Metric):
    """Mean over images of a site at every step and token, float64: what mean ablation leaves.

    Parameters
    ----------
    *shape : ``(T, N, ...)``.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int) -> None:
        """Add the sum ``(T, N, ...)`` over `count` images."""
        if not torch.isfinite(total).all():
            raise UserError("activations hold NaN or infinite values")
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Means ``(T, N, ...)``."""
        return self.total / self.count
