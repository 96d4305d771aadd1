"""Responses of every neuron and head at every step, accumulated by class.

The response of a neuron to an image is the mean of `mlp_post` over the patches; that of a head is
the mean over the patches of the norm of `z`. The inner updates of a memory are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.metrics.streaming.top_images import TopImages
from bvit_interp.models.stepping import device_of
from bvit_interp.probes.ablate import UNIT_SITES, SiteMeans
from bvit_interp.probes.probe import Edit, Key, Probe
from bvit_interp.vocabulary import Address

HALVES = 2


@dataclass(frozen=True)
class UnitResponses:
    """Responses of the U units of a site to a batch.

    Attributes
    ----------
    values : responses.
    patches : patch where the unit is strongest, row by row from 0.
    firing : share of the patches where a neuron is above 0; None for heads, whose norms always are.
    sums : the activations of the site, summed over the batch, ``(T, N, ...)`` float64.
    """

    values: Float[Tensor, "batch steps units"]
    patches: Int[Tensor, "batch steps units"]
    firing: Float[Tensor, "batch steps units"] | None
    sums: Float[Tensor, "steps tokens *unit"]


def unit_responses(
    probe: Probe, images: Float[Tensor, "batch 3 height width"]
) -> dict[str, UnitResponses]:
    """Responses of every neuron and head at every step, by site.

    Parameters
    ----------
    probe : of the model.
    images : normalised, on the model's device.
    """
    seen: dict[str, list[tuple[Tensor, ...]]] = {site: [] for site in UNIT_SITES}

    def look(activation: Tensor, address: Address) -> None:
        strength = activation.norm(dim=-1) if address.site == "z" else activation
        patches = strength[:, probe.num_prefix_tokens :]
        firing = (patches > 0).to(patches.dtype).mean(1)
        total = activation.sum(0, dtype=torch.float64)
        seen[address.site].append((patches.mean(1), patches.argmax(1), firing, total))

    edits: dict[Key, Edit] = {
        (site, step): look for step in range(1, probe.num_steps + 1) for site in UNIT_SITES
    }
    with probe.edit(edits):
        probe(images)
    responses = {}
    for site, steps in seen.items():
        values, patches, firing = (torch.stack([step[i] for step in steps], 1) for i in range(3))
        sums = torch.stack([step[3] for step in steps])
        responses[site] = UnitResponses(
            values, patches, firing if site == "mlp_post" else None, sums
        )
    return responses


class ClassSums(Metric):
    """Sums of the responses of each unit by class, in each half of the images, and by random group.

    Parameters
    ----------
    classes, steps, units : C, T, U; there are as many random groups as classes.

    Returns
    -------
    ``compute``: on the CPU, float64: `total` ``(3, C, T, U)`` and `count` ``(3, C)``: by class in
    the first half, by class in the second half, by group in all images; `squares` ``(T, U)``, the
    sum of squares over all images.

    Raises
    ------
    UserError
        For values that are not finite.
    """

    full_state_update = False
    total: Tensor
    count: Tensor
    squares: Tensor

    def __init__(self, classes: int, steps: int, units: int) -> None:
        super().__init__()
        shapes = {
            "total": (HALVES + 1, classes, steps, units),
            "count": (HALVES + 1, classes),
            "squares": (steps, units),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        values: Float[Tensor, "batch steps units"],
        labels: Int[Tensor, " batch"],
        halves: Int[Tensor, " batch"],
        groups: Int[Tensor, " batch"],
    ) -> None:
        """Add the responses to images of these classes, halves (0 or 1) and random groups."""
        values, classes = check_finite(values).double(), self.count.shape[1]
        for rows in (halves * classes + labels, HALVES * classes + groups):
            rows = rows.to(values.device)
            self.total.flatten(0, 1).index_add_(0, rows, values)
            self.count.flatten().index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
        self.squares += values.square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """`total`, `count` and `squares`."""
        return {"total": self.total.cpu(), "count": self.count.cpu(), "squares": self.squares.cpu()}


class ResponseStatistics:
    """What is accumulated of the units of a model over a data set.

    Parameters
    ----------
    probe : of the model. The states lie on its device from the start, because a process without
        images takes part in the gather too.
    classes : C.
    n_top : number of top images per unit and step.

    Attributes
    ----------
    class_sums, site_means, top_images : by site.
    firing : firing rates of the neurons.
    """

    def __init__(self, probe: Probe, classes: int, n_top: int) -> None:
        device = device_of(probe.model)
        steps = probe.num_steps
        tokens = probe.num_prefix_tokens + math.prod(probe.grid)
        shapes: dict[str, tuple[int, ...]] = {
            "z": (probe.num_heads, probe.head_width),
            "mlp_post": (probe.num_neurons,),
        }
        self.class_sums: dict[str, ClassSums] = {}
        self.site_means: dict[str, SiteMeans] = {}
        self.top_images: dict[str, TopImages] = {}
        for site, shape in shapes.items():
            self.class_sums[site] = ClassSums(classes, steps, shape[0]).to(device)
            self.site_means[site] = SiteMeans(steps, tokens, *shape).to(device)
            self.top_images[site] = TopImages(steps, shape[0], n_top).to(device)
        self.firing = MeanCI(steps, probe.num_neurons).to(device)

    def update(
        self,
        responses: Mapping[str, UnitResponses],
        labels: Int[Tensor, " batch"],
        halves: Int[Tensor, " batch"],
        groups: Int[Tensor, " batch"],
        index: Int[Tensor, " batch"],
    ) -> None:
        """Add responses to images of these classes, halves, random groups and positions in the data
        set."""
        for site, seen in responses.items():
            self.class_sums[site].update(seen.values, labels, halves, groups)
            self.site_means[site].update(seen.sums, len(labels))
            self.top_images[site].update(seen.values, seen.patches, index)
            if seen.firing is not None:
                self.firing.update(seen.firing)
