"""Gates: heads and neuron groups that can be closed at every step.

A closed gate ablates its unit at its step: it becomes zero, or a given activation. Gates are tables
``(T, U)`` over steps and units: U heads, then neuron groups (runs of neighbours). In a model with a
memory the gates are those of a step's own block; its inner updates stay intact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.stepping import State, answer, device_of, embed, proceed
from bvit_interp.probes.ablate import UNIT_SITES, ablate, neuron_groups, site_sums
from bvit_interp.probes.probe import Edit, Key, Probe


class Gates:
    """A model whose heads and neuron groups can be closed at every step.

    As it is made, closed units give zero; `with_fill` returns gates whose closed units give means.

    Parameters
    ----------
    model : any model that `unroll` takes; stays unchanged.
    groups : number of neuron groups per step.

    Attributes
    ----------
    steps, units : T, and U = heads + groups.
    sites : "z" (heads) and "mlp_post" (groups) -> the slice of the U units at that site.

    Raises
    ------
    UserError
        For more groups than neurons, and for blocks without heads or neurons.
    """

    def __init__(self, model: nn.Module, groups: int) -> None:
        self.probe = Probe(model)
        self.device = device_of(model)
        heads, neurons = self.probe.num_heads, self.probe.num_neurons
        if not 1 <= groups <= neurons:
            raise UserError(f"groups must be 1..{neurons}, the neurons of a step, got {groups}")
        self.steps, self.units = self.probe.num_steps, heads + groups
        self.sites = {"z": slice(0, heads), "mlp_post": slice(heads, self.units)}
        self._group = neuron_groups(neurons, groups).to(self.device)
        self._fill: Mapping[str, Tensor] | None = None

    def with_fill(self, fill: Mapping[str, Float[Tensor, "steps tokens ..."]]) -> Gates:
        """The same gates, whose closed units give these activations.

        Parameters
        ----------
        fill : site -> ``(T, N, ...)``.

        Raises
        ------
        ValueError
            For a missing site or another number of steps.
        """
        for site in UNIT_SITES:
            if site not in fill or len(fill[site]) != self.steps:
                raise ValueError(f"the fill of {site} must have {self.steps} steps")
        ready = copy.copy(self)
        ready._fill = dict(fill)
        return ready

    def logits(
        self,
        images: Float[Tensor, "batch channels height width"],
        keep: Shaped[Tensor, "variants steps units"],
    ) -> Float[Tensor, "variants batch classes"]:
        """Logits of all images under each table of gates."""
        state = embed(self.probe.model, images).repeated(len(keep))
        return self._run(state, keep).unflatten(0, (len(keep), -1))

    def sums(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> dict[str, Float[Tensor, "steps tokens ..."]]:
        """Sums of both sites over images, with all gates open, float64."""
        return site_sums(self.probe, images)

    def slopes(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch steps units"]:
        """``d log p(own answer) / d gate`` of each image at open gates."""
        shape = (len(images), self.steps, self.units)
        keep = torch.ones(shape, device=self.device, requires_grad=True)
        logits = self._run(embed(self.probe.model, images), keep)
        own_answer = logits.log_softmax(-1).amax(-1)
        return torch.autograd.grad(own_answer.sum(), keep)[0]

    def by_site(
        self, choose: Callable[..., Tensor], *tables: Shaped[Tensor, "steps units"]
    ) -> Shaped[Tensor, "steps units"]:
        """A table made by `choose` from the columns of each site, one site at a time."""
        parts = [choose(*(table[:, units] for table in tables)) for units in self.sites.values()]
        return torch.cat(parts, dim=1)

    def _run(
        self, state: State, keep: Shaped[Tensor, "variants steps units"]
    ) -> Float[Tensor, "images classes"]:
        """Logits from a state of all variants of the images, one behind the other."""
        edits: dict[Key, Edit] = {
            (site, step): self._edit(site, step, keep)
            for step in range(1, self.steps + 1)
            for site in self.sites
        }
        with self.probe.edit(edits):
            return answer(self.probe.model, proceed(self.probe.model, state))

    def _edit(self, site: str, step: int, keep: Tensor) -> Edit:
        at_site = keep[:, step - 1, self.sites[site]]
        if site == "mlp_post":
            at_site = at_site[:, self._group]
        return ablate(at_site, None if self._fill is None else self._fill[site][step - 1])
