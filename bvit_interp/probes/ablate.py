"""Ablation of heads and neurons, many variants of a batch at once.

Zero ablation silences a unit. Mean ablation leaves what the unit does on average. Resample ablation
gives it what it does on another image (Chan et al., 2022, "Causal scrubbing"). A batch is repeated
V times along its first axis (`State.repeated`), and variant v keeps the units of row v. One edit
serves one site at one step, so the run can start from the state before that step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.metrics.checks import check_finite
from bvit_interp.probes.probe import Edit, Key, Probe
from bvit_interp.vocabulary import Address, unit_axis

UNIT_SITES = ("z", "mlp_post")
"""Sites where units are ablated: heads before the projection, neurons after GELU."""


def ablate(
    keep: Shaped[Tensor, "variants units"], fill: Shaped[Tensor, "*shape"] | None = None
) -> Edit:
    """An edit of `z` or `mlp_post` that ablates units, each variant its own.

    Parameters
    ----------
    keep : ``(V, U)``, 1 or True for a unit that is kept; U heads or neurons. Values between 0 and 1
        interpolate. If `keep` is float, gradients flow to it.
    fill : what an ablated unit becomes: None for zero; a mean ``(N, ...)`` or each image's own
        value ``(B, N, ...)``, in the shape of the site.

    Returns
    -------
    fn(activation ``(V B, N, ...)``, address) -> the activation with the units of variant v ablated.
    """

    def edit(activation: Tensor, address: Address) -> Tensor:
        variants = activation.unflatten(0, (len(keep), -1))
        shape: tuple[int, ...] = (len(keep), 1, 1, -1)
        if unit_axis(address.site) == "H":
            shape = (*shape, 1)
        share = keep.to(activation.dtype).reshape(shape)
        if fill is None:
            return (variants * share).flatten(0, 1)
        filled = fill.to(activation.dtype).expand_as(variants)
        return torch.lerp(filled, variants, share).flatten(0, 1)

    return edit


def neuron_groups(neurons: int, groups: int) -> Int[Tensor, " neurons"]:
    """The group of every neuron: `groups` runs of neighbours whose sizes differ by at most one."""
    return torch.arange(neurons) * groups // neurons


def site_sums(
    probe: Probe,
    images: Float[Tensor, "batch channels height width"],
    sites: Iterable[str] = UNIT_SITES,
) -> dict[str, Float[Tensor, "steps tokens ..."]]:
    """Sum over the images of each site at every step, float64; no activation is kept.

    Parameters
    ----------
    images : normalised, on the model's device.

    Returns
    -------
    Site -> ``(T, N, ...)``.
    """
    sums: dict[str, list[Tensor]] = {site: [] for site in sites}

    def add(activation: Tensor, address: Address) -> None:
        sums[address.site].append(activation.double().sum(0))

    steps = range(1, probe.num_steps + 1)
    edits: dict[Key, Edit] = {(site, step): add for site in sums for step in steps}
    with torch.no_grad(), probe.edit(edits):
        probe(images)
    return {site: torch.stack(by_step) for site, by_step in sums.items()}


class SiteMeans(Metric):
    """Mean over images of a site at every step and token, float64: the values of mean ablation.

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

    def update(self, total: Float[Tensor, "steps tokens ..."], count: int) -> None:
        """Add the sum ``(T, N, ...)`` over `count` images.

        Raises
        ------
        ValueError
            For a sum of another shape.
        UserError
            For NaN or infinite values.
        """
        if total.shape != self.total.shape:
            raise ValueError(f"a sum of shape {tuple(self.total.shape)}, got {tuple(total.shape)}")
        self.total += check_finite(total)
        self.count += count

    def compute(self) -> Float[Tensor, "steps tokens ..."]:
        """Means ``(T, N, ...)``."""
        return self.total / self.count
