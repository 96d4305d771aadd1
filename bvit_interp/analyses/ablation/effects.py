"""Effects of ablating each unit over a span of steps.

A run starts again from the clean state before its first ablated step, so a unit at step t of T
costs T - t + 1 applications of the block. The units of a site go through the model together, one
copy of the batch behind the other. Where a norm-matched null is wanted, intact copies follow them:
their sublayer's output is then moved as far as the ablation moves it (`norm_matched.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from bvit_interp.analyses.ablation.norm_matched import OUTPUTS, move_as_far, random_directions
from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.divergence import kl_divergence
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import State, answer, device_of, proceed, states
from bvit_interp.probes.ablate import SiteMeans, ablate, neuron_groups, site_sums
from bvit_interp.probes.cache import Cache
from bvit_interp.probes.probe import Edit, Key, Probe
from bvit_interp.vocabulary import Address

METRICS = ("accuracy", "logit", "log_prob", "kl")
"""Metrics of an effect. Accuracy (0 or 1 per image), the true class's logit and its log-probability
(nats) are changes from the clean answer; kl is KL(clean || ablated) of the softmax (nats)."""
Span = tuple[int, int]
"""First and last step, from 1, at which a unit is ablated."""

_BYTES_PER_RUN = 2**28
_BYTES_OF_MEANS = 2**32


@dataclass(frozen=True)
class Units:
    """Units of a site that are ablated one at a time.

    Attributes
    ----------
    site : z or mlp_post.
    keep : ``(V, U)``, False where variant v ablates.
    order : for the null, the order ``(H E,)`` in which channels are dealt to heads; None for the
        units as they are.
    """

    site: str
    keep: Bool[Tensor, "variants units"]
    order: Int[Tensor, " channels"] | None = None

    @property
    def is_null(self) -> bool:
        """Whether these are random channels."""
        return self.order is not None


class Ablator:
    """Runs a model with its units ablated.

    As it is made it serves zero and resample ablation; `with_means` returns one for mean ablation.

    Parameters
    ----------
    model : stays unchanged.
    groups : number of groups of neighbouring neurons; 0 for none.
    seed : random seed for the channels of the null and for the random directions.
    draws : number of random directions per ablation for the norm-matched null.

    Attributes
    ----------
    units : the heads; their null, as many random channels of `z` as a head has, the same at every
        step; the groups of neurons.
    sites : shapes of the sites that are ablated, without batch and token axes.

    Raises
    ------
    UserError
        For more groups than neurons.
    """

    def __init__(self, model: Model, groups: int, seed: int = 0, draws: int = 1) -> None:
        self.probe = Probe(model)
        self.seed, self.draws = seed, draws
        heads, neurons = self.probe.num_heads, self.probe.num_neurons
        head_width = self.probe.head_width
        if groups > neurons:
            raise UserError(
                f"groups {groups} are more than the model's neurons; groups: 0..{neurons}"
            )
        self.device = device_of(model)
        self.tokens = self.probe.num_prefix_tokens + math.prod(self.probe.grid)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(heads * head_width, generator=generator).to(self.device)
        single = ~torch.eye(heads, dtype=torch.bool, device=self.device)
        self.units = [Units("z", single), Units("z", single[:1], order)]
        self.sites: dict[str, tuple[int, ...]] = {"z": (heads, head_width)}
        if groups:
            group = neuron_groups(neurons, groups).to(self.device)
            members = group == torch.arange(groups, device=self.device)[:, None]
            self.units.append(Units("mlp_post", ~members))
            self.sites["mlp_post"] = (neurons,)
        self._means: Mapping[str, Tensor] | None = None

    def with_means(self, means: Mapping[str, Float[Tensor, "steps tokens ..."]]) -> Ablator:
        """The same ablations, with the activations that mean ablation fills in.

        Parameters
        ----------
        means : site -> ``(T, N, ...)`` for every site of `sites`; see `empty_means`.

        Raises
        ------
        ValueError
            For a missing site or a wrong shape.
        """
        for site, shape in self._mean_shapes().items():
            if site not in means or means[site].shape != shape:
                raise ValueError(f"means of {site} must have the shape {shape}")
        ready = copy.copy(self)
        ready._means = dict(means)
        return ready

    def empty_means(self) -> dict[str, SiteMeans]:
        """A streaming mean per site, on the model's device, to be updated with `clean_sums`.

        Raises
        ------
        UserError
            For means that would not fit in memory.
        """
        shapes = self._mean_shapes()
        size = 8 * sum(map(math.prod, shapes.values()))
        if size > _BYTES_OF_MEANS:
            raise UserError(
                f"means of every step and token would take {size / 2**30:.0f} GiB: choose other"
                " methods"
            )
        return {site: SiteMeans(*shape).to(self.device) for site, shape in shapes.items()}

    def clean_sums(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> dict[str, Float64[Tensor, "steps tokens ..."]]:
        """Sums over images of the clean activations of each site."""
        return site_sums(self.probe, images.to(self.device), self.sites)

    def donor_bytes(self) -> int:
        """Memory of the clean activations of one image, from which others are resampled."""
        numbers = sum(map(math.prod, self.sites.values()))
        return 4 * numbers * self.probe.num_steps * self.tokens

    def effects(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        methods: Sequence[str],
        spans: Sequence[Span],
        donors: Float[Tensor, "batch channels height width"] | None = None,
        index: Int[Tensor, " batch"] | None = None,
    ) -> Float64[Tensor, "batch methods units columns metrics"]:
        """Changes of the answer to each image.

        Parameters
        ----------
        images, labels : normalised, and their classes.
        methods : zero, mean or resample.
        spans : steps at which the unit is ablated; after them the run goes on without ablation.
        donors : images whose clean activations resample ablation fills in.
        index : positions of the images in the data set, from which random directions are drawn;
            None for no norm-matched null.

        Returns
        -------
        The last axis as in `METRICS`; units in the order of `units`. A column per span. With
        `index`, a column per span of one step follows, in their order: the norm-matched null of
        that step. It is nan for random channels, and for blocks that do not tell apart what
        attention and FFN add to the residual stream.

        Raises
        ------
        ValueError
            For mean ablation without means, or resample ablation without donors.
        UserError
            For NaN or infinite logits.
        """
        labels = labels.to(self.device)
        clean_states = list(states(self.probe.model, images.to(self.device)))
        clean = answer(self.probe.model, clean_states[-1])
        donated = None
        if donors is not None:
            donated = self.probe.record(donors.to(self.device), list(self.sites))
        changes = []
        for method in methods:
            for units in self.units:
                fills = self._fills(method, units, donated)
                ablated, matched = [], []
                for first, last in spans:
                    images_moved = (
                        index if first == last and self._can_match(units, first) else None
                    )
                    logits = self._run(clean_states[first - 1], last, units, fills, images_moved)
                    of_span, *moved = (_changes(clean, each, labels) for each in logits)
                    ablated.append(of_span)
                    if index is not None and first == last:
                        nothing = torch.full_like(of_span, math.nan)
                        matched.append(torch.stack(moved).mean(0) if moved else nothing)
                changes.append(torch.stack([*ablated, *matched], dim=2))
        count = sum(len(units.keep) for units in self.units)
        return torch.cat(changes, dim=1).unflatten(1, (len(methods), count))

    def _can_match(self, units: Units, step: int) -> bool:
        """Whether the null that is matched in norm can be made for these units."""
        if units.is_null:
            return False
        try:
            self.probe.address((OUTPUTS[units.site], step))
        except UserError:
            return False
        return True

    def _mean_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            site: (self.probe.num_steps, self.tokens, *shape) for site, shape in self.sites.items()
        }

    def _fills(
        self, method: str, units: Units, donated: Cache | None
    ) -> Sequence[Float[Tensor, "*shape"] | None]:
        """Replacement of the site at every step, its channels in the order of the units."""
        steps = range(1, self.probe.num_steps + 1)
        fills: Iterable[Tensor]
        if method == "zero":
            return [None for _ in steps]
        if method == "mean":
            if self._means is None:
                raise ValueError("mean ablation needs means: Ablator.with_means")
            fills = self._means[units.site].unbind()
        else:
            if donated is None:
                raise ValueError("resample ablation needs donors")
            fills = [donated[units.site, step] for step in steps]
        return [fill if units.order is None else _deal(fill, units.order) for fill in fills]

    def _run(
        self,
        before: State,
        last: int,
        units: Units,
        fills: Sequence[Float[Tensor, "*shape"] | None],
        index: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "runs variants batch classes"]:
        """Logits with each unit ablated from the step after `before` to step `last`.

        With `index` (for a span of one step), these are followed by a run per draw of the
        norm-matched null.
        """
        batch, step = len(before.tokens), before.step + 1
        runs = 1 if index is None else 1 + self.draws
        numbers = batch * self.tokens * (4 * self.probe.model.embed_dim + self.probe.num_neurons)
        at_once = max(1, _BYTES_PER_RUN // (4 * numbers * runs))
        logits = []
        for chosen in torch.arange(len(units.keep)).split(at_once):
            keep = units.keep[chosen.to(self.device)]
            intact = torch.ones_like(keep).repeat(runs - 1, 1)
            edits: dict[Key, Edit] = {
                (units.site, each): _reordered(
                    ablate(torch.cat([keep, intact]), fills[each - 1]), units.order
                )
                for each in range(step, last + 1)
            }
            if index is not None:
                edits[OUTPUTS[units.site], step] = move_as_far(
                    random_directions(
                        index,
                        units.site,
                        step,
                        chosen.tolist(),
                        self.probe.model.embed_dim,
                        self.draws,
                        self.seed,
                    )
                )
            with self.probe.edit(edits):
                after = proceed(self.probe.model, before.repeated(runs * len(keep)))
            answers = answer(self.probe.model, after)
            logits.append(answers.unflatten(0, (runs, len(keep), batch)))
        return torch.cat(logits, dim=1)


def _deal(
    activation: Float[Tensor, "*batch heads width"], order: Int[Tensor, " channels"]
) -> Float[Tensor, "*batch heads width"]:
    """The channels of all heads in another order."""
    return activation.flatten(-2)[..., order].view_as(activation)


def _reordered(edit: Edit, order: Tensor | None) -> Edit:
    """The edit, for heads that are made of the channels in `order`."""
    if order is None:
        return edit

    def edit_dealt(activation: Tensor, address: Address) -> Tensor | None:
        new = edit(_deal(activation, order), address)
        return None if new is None else _deal(new, order.argsort())

    return edit_dealt


def _changes(
    clean: Float[Tensor, "batch classes"],
    ablated: Float[Tensor, "variants batch classes"],
    labels: Int[Tensor, " batch"],
) -> Float64[Tensor, "batch variants metrics"]:
    """`METRICS` of ablated logits beside the clean ones."""
    check_finite(clean, "logits")
    check_finite(ablated, "logits")
    clean, ablated = clean.double()[:, None], ablated.double().transpose(0, 1)
    target = labels[:, None, None].expand(*ablated.shape[:2], 1)
    right = (ablated.argmax(-1) == labels[:, None]).double()
    clean_right = (clean.argmax(-1) == labels[:, None]).double()
    logit = (ablated - clean).gather(-1, target)[..., 0]
    log_prob = (ablated.log_softmax(-1) - clean.log_softmax(-1)).gather(-1, target)[..., 0]
    kl = kl_divergence(clean, ablated)
    return torch.stack([right - clean_right, logit, log_prob, kl], dim=-1)
