"""What ablating a unit over a span of steps does to the answer, and how its effects part by step
and by unit.

A run starts again from the clean state before its first ablated step, so a unit at step t of T
costs T - t + 1 applications of the block; the units of a kind go together, one copy of the batch
behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.models.stepping import State, advance, answer, embed, proceed
from bvit_interp.probes.ablate import SiteMeans, ablate, neuron_groups
from bvit_interp.probes.cache import Cache
from bvit_interp.probes.probe import Edit, Probe
from bvit_interp.vocabulary import Address

ANSWERS = ("accuracy", "logit", "log_prob", "kl")
"""What is said of an answer: was it right (0 or 1), the true class's logit and log-probability
(nats), all three as changes from the clean answer, and KL(clean || ablated) of the softmax
(nats)."""
FOLDS = 10
Span = tuple[int, int]
"""First and last step, from 1, at which a unit is ablated."""

_BYTES_OF_A_RUN = 2**28
_BYTES_OF_MEANS = 2**32
_T_95 = 2.262157162740992  # Student's t of FOLDS - 1 degrees of freedom


@dataclass(frozen=True)
class Units:
    """Units of a site that are ablated one at a time.

    Attributes
    ----------
    kind : head, null or neurons.
    site : z or mlp_post.
    keep : ``(V, U)`` bool, False where variant v ablates.
    order : of a null, the order ``(H E,)`` in which channels are dealt to heads; none for the heads
        as they are.
    """

    kind: str
    site: str
    keep: Tensor
    order: Tensor | None = None


class Ablator:
    """A model, run with its units ablated.

    Parameters
    ----------
    model : it is not changed.
    groups : groups of neighbouring neurons, 0 for none.
    seed : of the random channels of the null.

    Attributes
    ----------
    units : the heads; as their null as many random channels of `z` as a head has, the same at every
        step; the groups.
    means : site -> ``(T, N, ...)``, what mean ablation fills in; to be set.

    Raises
    ------
    UserError
        For more groups than neurons, or means that would not fit in memory.
    """

    def __init__(self, model: VisionTransformer, groups: int, seed: int = 0) -> None:
        self.probe = Probe(model)
        heads, neurons = self.probe.num_heads, self.probe.num_neurons
        head_width = int(self.probe.model.blocks[0].attn.head_dim)
        if groups > neurons:
            raise UserError(
                f"groups {groups} are more than the model's neurons; groups: 0..{neurons}"
            )
        self.device = next(model.parameters()).device
        self.tokens = self.probe.num_prefix_tokens + math.prod(self.probe.grid)
        order = torch.randperm(
            heads * head_width, generator=torch.Generator().manual_seed(seed)
        ).to(self.device)
        each = ~torch.eye(heads, dtype=torch.bool, device=self.device)
        self.units = [Units("head", "z", each), Units("null", "z", each[:1], order)]
        if groups:
            of_group = neuron_groups(neurons, groups).to(self.device)
            members = of_group == torch.arange(groups, device=self.device)[:, None]
            self.units.append(Units("neurons", "mlp_post", ~members))
        self.shapes = {"z": (heads, head_width), "mlp_post": (neurons,)}
        self.shapes = {units.site: self.shapes[units.site] for units in self.units}
        self.means: dict[str, Tensor] = {}

    def site_means(self) -> dict[str, SiteMeans]:
        """Empty means of the sites, on the model's device."""
        shapes = {
            site: (self.probe.num_steps, self.tokens, *shape) for site, shape in self.shapes.items()
        }
        if (size := 8 * sum(map(math.prod, shapes.values()))) > _BYTES_OF_MEANS:
            raise UserError(
                f"means of every step and token would take {size / 2**30:.0f} GiB: choose other methods"
            )
        return {site: SiteMeans(*shape).to(self.device) for site, shape in shapes.items()}

    def sums(self, images: Tensor) -> dict[str, Tensor]:
        """Sums over the images of the clean activations of each site, ``(T, N, ...)`` float64; none
        is kept."""
        found: dict[str, list[Tensor]] = {site: [] for site in self.shapes}

        def watch(activation: Tensor, address: Address) -> None:
            found[address.site].append(activation.double().sum(0))

        steps = range(1, self.probe.num_steps + 1)
        with self.probe.edit({(site, step): watch for site in self.shapes for step in steps}):
            self.probe(images.to(self.device))
        return {site: torch.stack(of_steps) for site, of_steps in found.items()}

    def donor_bytes(self) -> int:
        """What the clean activations of one image take while others are resampled from it."""
        numbers = sum(map(math.prod, self.shapes.values()))
        return 4 * numbers * self.probe.num_steps * self.tokens

    def effects(
        self,
        images: Tensor,
        labels: Tensor,
        methods: Sequence[str],
        spans: Sequence[Span],
        donors: Tensor | None = None,
    ) -> Tensor:
        """Changes of the answer to each image.

        Parameters
        ----------
        images, labels : ``(B, C, H, W)`` and ``(B,)``.
        methods : of zero, mean (of `means`) and resample (from `donors`).
        spans : steps at which the unit is ablated; the run goes on clean from there.
        donors : images ``(B, C, H, W)`` whose own clean activations are filled in.

        Returns
        -------
        ``(B, methods, units, spans, 4)`` float64, the last axis as `ANSWERS`, the units as `units`
        lists them.
        """
        view, labels = self.probe.model, labels.to(self.device)
        states = [embed(view, images.to(self.device))]
        for _ in view.blocks:
            states.append(advance(view, states[-1]))
        clean = answer(view, states[-1])
        given: Cache | None = None
        if donors is not None:
            given = self.probe.record(donors.to(self.device), list(self.shapes))
        found = []
        for method in methods:
            for units in self.units:
                fills = self._fills(method, units, given if method == "resample" else None)
                runs = [self._run(states[first - 1], last, units, fills) for first, last in spans]
                found.append(
                    torch.stack([_changes(clean, logits, labels) for logits in runs], dim=2)
                )
        count = sum(len(units.keep) for units in self.units)
        return torch.cat(found, dim=1).unflatten(1, (len(methods), count))

    def _fills(self, method: str, units: Units, given: Cache | None) -> Sequence[Tensor | None]:
        """What the ablated units become at every step, on average or as `given`; of a null in its
        order."""
        steps = range(self.probe.num_steps)
        if method == "zero":
            return [None for _ in steps]
        clean = [
            self.means[units.site][t] if given is None else given[units.site, t + 1] for t in steps
        ]
        return [fill if units.order is None else _dealt(fill, units.order) for fill in clean]

    def _run(
        self, before: State, last: int, units: Units, fills: Sequence[Tensor | None]
    ) -> Tensor:
        """Logits ``(V, B, C)`` with each unit ablated from the step after `before` to step
        `last`."""
        batch = len(before.tokens)
        numbers = batch * self.tokens * (4 * self.probe.model.embed_dim + self.probe.num_neurons)
        at_once = max(1, _BYTES_OF_A_RUN // (4 * numbers))
        logits = []
        for keep in units.keep.split(at_once):
            steps = range(before.step + 1, last + 1)
            edits = {
                (units.site, t): _in_order(ablate(keep, fills[t - 1]), units.order) for t in steps
            }
            with self.probe.edit(edits):
                after = proceed(self.probe.model, before.repeated(len(keep)))
            logits.append(answer(self.probe.model, after).unflatten(0, (len(keep), batch)))
        return torch.cat(logits)


def _dealt(activation: Tensor, order: Tensor) -> Tensor:
    """Channels of all heads ``(..., H, E)`` in another order."""
    return activation.flatten(-2)[..., order].view_as(activation)


def _in_order(edit: Edit, order: Tensor | None) -> Edit:
    """The edit, of heads that are made of the channels in `order`."""
    if order is None:
        return edit

    def of_dealt(activation: Tensor, address: Address) -> Tensor | None:
        new = edit(_dealt(activation, order), address)
        return None if new is None else _dealt(new, order.argsort())

    return of_dealt


def _changes(clean: Tensor, ablated: Tensor, labels: Tensor) -> Tensor:
    """`ANSWERS` of logits ``(V, B, C)`` beside the clean ones ``(B, C)``: ``(B, V, 4)``."""
    if not (torch.isfinite(clean).all() and torch.isfinite(ablated).all()):
        raise UserError("logits hold NaN or infinite values")
    clean, ablated = clean.double(), ablated.double().transpose(0, 1)  # (B, V, C)
    before, after = clean.log_softmax(-1)[:, None], ablated.log_softmax(-1)
    of_class = labels[:, None, None]
    found = [
        (ablated.argmax(-1) == labels[:, None]).double()
        - (clean.argmax(-1) == labels).double()[:, None],
        *(
            (new - old).gather(-1, of_class.expand(*new.shape[:2], 1))[..., 0]
            for new, old in ((ablated, clean[:, None]), (after, before))
        ),
        (before.exp() * (before - after)).sum(-1),
    ]
    return torch.stack(found, dim=-1)


def steps_and_units(
    effects: np.ndarray, counts: np.ndarray, seed: int = 0, draws: int = 1000
) -> dict[str, dict]:
    """How the effects of ablating a unit at a step part: by the step, by the unit, or which unit
    matters when.

    The sums of squares of a two-way analysis of variance, each of products of different folds of
    the images alone: an image's noise, which is in one fold, then counts as no variance. Shares of
    their sum.

    Parameters
    ----------
    effects : mean effect over each fold, ``(K, T, U)``.
    counts : images of each fold, ``(K,)``.
    seed, draws : of the permutations.

    Returns
    -------
    `variance_steps`, `variance_units`, `variance_both`: each `value`, the `null` expected with the
    units shuffled within each step (`variance_steps`: the steps within each unit), and `low` and
    `high`, the delete-a-fold jackknife's 95 % interval, if there are ten folds. `reliability`, the
    correlation over images of even and of odd folds of the differences between the units of a step:
    `value`, `null` 0, and `p_value`, with the units renumbered in every fold anew but at all its
    steps alike, as an image's noise is in all of them. nan where all is noise.
    """
    there = counts > 0
    weighted, counts = effects[there] * counts[there, None, None], counts[there]
    steps, units = effects.shape[1:]
    shares = _shares(weighted)
    low, high = _jackknife(weighted, shares)
    null_units = (1 - shares[0]) / steps
    nulls = (
        (1 - shares[1]) / units,
        null_units,
        1 - shares[0] - null_units,
    )  # the last: what shuffled units leave
    columns = zip(shares, low, high, nulls, strict=True)
    found = {
        f"variance_{name}": dict(zip(("value", "low", "high", "null"), values, strict=True))
        for name, values in zip(("steps", "units", "both"), columns, strict=True)
    }
    value, p_value = _reliability(weighted, seed, draws)
    return found | {"reliability": {"value": value, "null": 0.0, "p_value": p_value}}


def _across(values: np.ndarray) -> np.ndarray:
    """Sum over cells of the products of different folds; ``(..., K, T, U)`` -> ``(...)``."""
    return (values.sum(-3) ** 2).sum((-2, -1)) - (values**2).sum((-3, -2, -1))


def _shares(weighted: np.ndarray) -> np.ndarray:
    """Shares ``(3,)`` of the steps, the units, and both together."""
    grand = weighted.mean((-2, -1), keepdims=True)
    of_step = weighted.mean(-1, keepdims=True) - grand
    of_unit = weighted.mean(-2, keepdims=True) - grand
    whole = np.zeros_like(weighted)
    parts = np.array(
        [_across(part + whole) for part in (of_step, of_unit, weighted - grand - of_step - of_unit)]
    )
    return parts / parts.sum() if parts.sum() > 0 else np.full(3, math.nan)


def _jackknife(weighted: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(weighted) < FOLDS:
        return np.full(3, math.nan), np.full(3, math.nan)
    without = np.array([_shares(np.delete(weighted, k, axis=0)) for k in range(FOLDS)])
    half = _T_95 * np.sqrt((FOLDS - 1) * without.var(0))
    return shares - half, shares + half


def _reliability(weighted: np.ndarray, seed: int, draws: int) -> tuple[float, float]:
    """Correlation of the two halves of the folds, and its p-value; the numbering as it is counts as
    a draw."""
    count, steps, units = weighted.shape
    if units < 2 or count < 2:
        return math.nan, math.nan
    within = weighted - weighted.mean(-1, keepdims=True)
    found = _halves(within[None])[0]
    orders = np.random.default_rng(seed).permuted(
        np.tile(np.arange(units), (draws, count, 1)), axis=-1
    )
    by_chance = _halves(
        np.take_along_axis(within[None], orders[:, :, None].repeat(steps, axis=2), axis=-1)
    )
    slack = 1e-9 * abs(found)  # orders that change nothing but the rounding are no larger
    return float(found), float((1 + (by_chance >= found - slack).sum()) / (1 + draws))


def _halves(within: np.ndarray) -> np.ndarray:
    """Correlations ``(...)`` of the sums of even and of odd folds of differences ``(..., K, T,
    U)``; nan of nothing."""
    even, odd = within[..., ::2, :, :].sum(-3), within[..., 1::2, :, :].sum(-3)
    scale = np.sqrt((even**2).sum((-2, -1)) * (odd**2).sum((-2, -1)))
    products = (even * odd).sum((-2, -1))
    return np.divide(products, scale, out=np.full_like(scale, math.nan), where=scale > 0)
