"""Circuits over steps: a gate for every head and neuron group of every step, scored, learned,
exchanged between steps.

A closed gate ablates its unit at its step: to zero, or to its mean over the fit images at that
token. Gates are tables ``(T, U)``, U heads, then neuron groups (runs of neighbours), and both kinds
keep the same share. With a memory, the gates are those of a step's own block; its inner updates
stay whole.

- `Fit.slopes`: the mean over images of ``|d log p(own answer) / d gate|`` at open gates, the head
  importance of Michel et al. (2019, https://arxiv.org/abs/1905.10650), a first-order attribution
  patch (Nanda, 2023). It takes the model's own answer, for the KL divergence to the whole model has
  no slope there.
- `Fit.learned`: the gates of the k largest of scores that descend ``KL(whole || gated)``; the
  gradient with respect to the gates goes straight through to the scores, those of closed gates too
  (Ramanujan et al., 2020, https://arxiv.org/abs/1911.13299, who learn weights' masks so). k is
  exact, where hard-concrete gates (Louizos et al., 2018) would need a penalty tuned to it.

Everything here is deterministic; no random number but those of a generator given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.errors import UserError
from bvit_interp.metrics import jaccard
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.models.stepping import State, answer, embed, proceed
from bvit_interp.probes.ablate import SITES_OF_UNITS, ablate, neuron_groups
from bvit_interp.probes.probe import Edit, Probe
from bvit_interp.vocabulary import Address

RATE = 0.05  # of Adam on scores that start within 0..1, falling to 0
Place = tuple[str, int]


class Gates:
    """A model whose heads and neuron groups can be closed at every step.

    Parameters
    ----------
    model : a `BViT` or any timm `VisionTransformer`, returned as it came.
    groups : neuron groups of a step.

    Attributes
    ----------
    steps, units : T, and U = heads + groups.
    kinds : "head" and "neuron" -> the slice of the U units that are so.
    fill : what a closed unit gives, by site and step; None for zero.

    Raises
    ------
    UserError
        For more groups than neurons.
    """

    def __init__(self, model: VisionTransformer, groups: int) -> None:
        self.probe = Probe(model)
        self.device = next(model.parameters()).device
        heads, neurons = self.probe.num_heads, self.probe.num_neurons
        if not 1 <= groups <= neurons:
            raise UserError(f"groups must be 1..{neurons}, the neurons of a step, got {groups}")
        self.steps, self.units = self.probe.num_steps, heads + groups
        self.kinds = {"head": slice(0, heads), "neuron": slice(heads, self.units)}
        self._group = neuron_groups(neurons, groups).to(self.device)
        self.places: list[Place] = [
            (site, step) for step in range(1, self.steps + 1) for site in SITES_OF_UNITS.values()
        ]
        self.fill: dict[Place, Tensor | None] = dict.fromkeys(self.places)

    def logits(self, images: Tensor, keep: Tensor) -> Tensor:
        """Logits ``(V, B, classes)`` of images under each of the gates ``(V, T, U)``."""
        state = embed(self.probe.model, images).repeated(len(keep))
        return self._run(state, keep).unflatten(0, (len(keep), -1))

    def sums(self, images: Tensor) -> dict[Place, Tensor]:
        """Every site summed over images: ``(N, H, E)`` and ``(N, F)`` float64."""
        found: dict[Place, Tensor] = {}

        def add(activation: Tensor, address: Address) -> None:
            found[address.site, address.step] = activation.double().sum(0)

        with torch.inference_mode(), self.probe.edit(dict.fromkeys(self.places, add)):
            self.probe(images)
        return found

    def slopes(self, images: Tensor) -> Tensor:
        """``d log p(own answer) / d gate`` of each image at open gates, ``(B, T, U)``."""
        keep = torch.ones(
            len(images), self.steps, self.units, device=self.device, requires_grad=True
        )
        chosen = self._run(embed(self.probe.model, images), keep).log_softmax(-1).amax(-1)
        return torch.autograd.grad(chosen.sum(), keep)[0]

    def by_kind(self, choose: Callable[..., Tensor], *tables: Tensor) -> Tensor:
        """``(T, U)``: what `choose` makes of the units of each kind, one kind at a time, in tables
        ``(T, U)``."""
        return torch.cat(
            [choose(*(table[:, units] for table in tables)) for units in self.kinds.values()], dim=1
        )

    def _run(self, state: State, keep: Tensor) -> Tensor:
        """Logits of a state of V B images under gates ``(V, T, U)``."""
        with self.probe.edit({place: self._edit(place, keep) for place in self.places}):
            return answer(self.probe.model, proceed(self.probe.model, state))

    def _edit(self, place: Place, keep: Tensor) -> Edit:
        site, step = place
        if site == SITES_OF_UNITS["head"]:
            return ablate(keep[:, step - 1, self.kinds["head"]], self.fill[place])
        return ablate(keep[:, step - 1, self.kinds["neuron"]][:, self._group], self.fill[place])


def divergence(whole: Tensor, gated: Tensor) -> Tensor:
    """``KL(whole || gated)`` in nats ``(...)`` of log-probabilities ``(..., C)``."""
    return F.kl_div(gated, whole, reduction="none", log_target=True).sum(-1)


class Fit:
    """The images that gates are fit to: what a closed unit gives, how much each matters, gates
    learned on them.

    Parameters
    ----------
    gates : the model; its `fill` is set.
    batches, geometry : the images, always in these batches, and the geometry the model sees them
        in; the batches' index counts the images, 0..n - 1.
    mean : a closed unit gives its mean over these images, not zero.

    Attributes
    ----------
    slopes : ``(T, U)`` float64 on the CPU, the mean over images of ``|d log p(own answer) / d
        gate|``.
    count : images n.

    Raises
    ------
    UserError
        For NaN in weights or activations.
    """

    def __init__(
        self, gates: Gates, batches: Sequence[Batch], geometry: Geometry, mean: bool
    ) -> None:
        self.gates, self.batches, self.geometry = gates, batches, geometry
        self.count = sum(map(len, batches))
        if mean:
            sums = self._of_parts(lambda part: gates.sums(self._images(part)))
            gates.fill = {
                place: (sum(of[place] for of in sums) / self.count).float()
                for place in gates.places
            }
        with torch.no_grad():
            whole = self._of_parts(lambda part: gates.probe(self._images(part)).log_softmax(-1))
        self._whole = torch.cat(whole)
        slopes = self._of_parts(lambda part: gates.slopes(self._images(part)).double().abs().sum(0))
        self.slopes = torch.stack(slopes).sum(0).cpu() / self.count
        if not self.slopes.isfinite().all():
            raise UserError("weights or activations hold NaN or infinite values")

    def learned(self, share: float, same: bool, epochs: int) -> Tensor:
        """Scores ``(T, U)``, of which `best` (if `same`, `best_same`) takes the gates to keep open.

        They start as the ranks of `slopes`, in 0..1 within a kind; of the start and the end of
        every epoch, those whose gates have the least KL over the images are taken.
        """
        choose = partial(best_same if same else best, share=share)
        slopes = self.slopes.mean(0, keepdim=True) if same else self.slopes
        scores = self.gates.by_kind(_ranks, slopes).expand_as(self.slopes).clone()
        adam, updates = torch.optim.Adam([scores], lr=RATE), epochs * len(self.batches)
        found = [(self.loss(self.gates.by_kind(choose, scores)), scores.clone())]
        for i in range(updates):
            batch = self.batches[i % len(self.batches)]
            gradient = self._descent(batch, self.gates.by_kind(choose, scores))
            scores.grad = gradient.mean(0).expand_as(scores).clone() if same else gradient
            adam.param_groups[0]["lr"] = RATE * (1 - i / updates)
            adam.step()
            if (i + 1) % len(self.batches) == 0:
                found.append((self.loss(self.gates.by_kind(choose, scores)), scores.clone()))
        return min(found, key=lambda each: each[0])[1]

    def loss(self, gates: Tensor) -> float:
        """Mean ``KL(whole || gated)`` of the images under gates ``(T, U)``, nats."""
        with torch.no_grad():
            parts = self._of_parts(lambda part: self._divergence(part, gates.float()))
        return float(torch.cat(parts).double().mean())

    def _descent(self, batch: Batch, gates: Tensor) -> Tensor:
        """Gradient ``(T, U)`` float64 of the mean KL of a batch with respect to gates ``(T,
        U)``."""

        def run(part: Batch) -> Tensor:
            share = gates.float().requires_grad_()
            return torch.autograd.grad(self._divergence(part, share).sum(), share)[0].double()

        return torch.stack(run_in_halves(run, batch)).sum(0) / len(batch)

    def _divergence(self, part: Batch, share: Tensor) -> Tensor:
        """KL of each image ``(B,)`` under shares ``(T, U)``."""
        gated = self.gates.logits(self._images(part), share.to(self.gates.device)[None])[0]
        return divergence(self._whole[part.index], gated.log_softmax(-1))

    def _images(self, part: Batch) -> Tensor:
        return part.views[self.geometry][0].to(self.gates.device)

    def _of_parts(self, run: Callable[[Batch], Any]) -> list[Any]:
        """Results of all batches, or of their halves where memory does not suffice."""
        return [found for batch in self.batches for found in run_in_halves(run, batch)]


def conditions(
    fit: Fit, method: str, share: float, epochs: int, draws: int, seed: int
) -> dict[str, Tensor]:
    """Gates of every condition, all with as many open of each kind, bool ``(variants, T, U)``.

    `per-step`, the circuit by "gradient" or "learned" scores; `even`, as many units at every step,
    each step's best; `all-steps`, the same units at every step; `shuffled`, at each step the gates
    of another; `shuffled-units`, each step's own number of units, those another step ranks first;
    `random`, its own number of random units; `even-random`, random units, as many at every step;
    `same-random`, random units, the same at every step. The first three have one variant, the
    others `draws`.
    """
    gates, generator = fit.gates, torch.Generator().manual_seed(seed)
    orders = [other_order(gates.steps, generator) for _ in range(draws)]
    chance = torch.rand(draws, gates.steps, gates.units, generator=generator)
    scores, same = fit.slopes, fit.slopes
    if method == "learned":
        scores, same = fit.learned(share, False, epochs), fit.learned(share, True, epochs)
    own = gates.by_kind(partial(best, share=share), scores)
    shared = gates.by_kind(partial(best_same, share=share), same)
    return {
        "per-step": own[None],
        "even": gates.by_kind(best_of_step, scores, shared)[None],
        "all-steps": shared[None],
        "shuffled": torch.stack([own[order] for order in orders]),
        "shuffled-units": torch.stack(
            [gates.by_kind(best_of_step, scores[order], own) for order in orders]
        ),
        "random": torch.stack([gates.by_kind(best_of_step, drawn, own) for drawn in chance]),
        "even-random": torch.stack(
            [gates.by_kind(best_of_step, drawn, shared) for drawn in chance]
        ),
        "same-random": torch.stack(
            [gates.by_kind(partial(best_same, share=share), drawn) for drawn in chance]
        ),
    }


class Judged:
    """Streaming scores of a model under gates, of several conditions with some draws each.

    Parameters
    ----------
    num_classes : classes C.
    draws : how many of the gates' variants each condition has, in order; V in all. The first
        condition is the one the others are compared with.
    device : where it is kept.
    """

    def __init__(self, num_classes: int, draws: Sequence[int], device: torch.device) -> None:
        self.draws = list(draws)
        self._whole = Classification(num_classes).to(device)
        self._means = MeanCI(len(self.draws), 3).to(device)
        self._excess = MeanCI(len(self.draws)).to(device)
        self._each = MeanCI(sum(self.draws)).to(device)

    def update(self, whole: Tensor, gated: Tensor, labels: Tensor) -> None:
        """Add a batch: the whole model's logits ``(B, C)``, the gated ones ``(V, B, C)``, labels
        ``(B,)``."""
        self._whole.update(whole, labels)
        if not gated.isfinite().all():
            raise UserError("logits hold NaN or infinite values")
        kl = divergence(
            whole.double().log_softmax(-1).expand_as(gated), gated.double().log_softmax(-1)
        )
        said = gated.argmax(-1)
        values = torch.stack(
            [kl, (said == labels).double(), (said == whole.argmax(-1)).double()], dim=-1
        )
        means = torch.stack(
            [part.mean(0) for part in values.split(self.draws)], dim=1
        )  # (B, conditions, 3)
        self._means.update(means)
        self._excess.update(means[:, :, 0] - means[:, :1, 0])
        self._each.update(kl.T)

    def compute(self) -> dict[str, Any]:
        """`whole`: what `Classification` gives; `kl`, `accuracy`, `agreement`, `excess` (KL less
        the first condition's, image by image): what `MeanCI` gives, each ``(conditions,)``;
        `kl_least` and `kl_most` of a draw."""
        means, each = self._means.compute(), self._each.compute()["value"].split(self.draws)
        found: dict[str, Any] = {"whole": self._whole.compute(), "excess": self._excess.compute()}
        for i, name in enumerate(("kl", "accuracy", "agreement")):
            found[name] = {key: values[:, i] for key, values in means.items()}
        return found | {
            "kl_least": torch.stack([of.min() for of in each]),
            "kl_most": torch.stack([of.max() for of in each]),
        }


# ---- which gates: tables (T, n) of the units of one kind ------------------------------------------------


def best(scores: Tensor, share: float) -> Tensor:
    """Bool ``(T, n)``: the highest round(share T n) of all steps' scores; equal ones in order."""
    order = scores.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order[: round(share * scores.numel())]] = True
    return chosen.reshape(scores.shape)


def best_same(scores: Tensor, share: float) -> Tensor:
    """Bool ``(T, n)``, as many as `best`: the units of the highest scores summed over steps, at
    every step.

    What does not go into T is given to the next unit, at steps spread evenly.
    """
    steps = len(scores)
    everywhere, rest = divmod(round(share * scores.numel()), steps)
    order = scores.sum(0).argsort(descending=True, stable=True)
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    chosen[:, order[:everywhere]] = True
    for i in range(rest):
        chosen[i * steps // rest, order[everywhere]] = True
    return chosen


def best_of_step(scores: Tensor, like: Tensor) -> Tensor:
    """Bool ``(T, n)``: of each step the highest scores, as many as the gates `like` ``(T, n)`` have
    at that step."""
    places = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return places < like.sum(1, keepdim=True)


def other_order(steps: int, generator: torch.Generator) -> Tensor:
    """The steps ``(T,)`` int64 in a random order in which none has its own place (of one step,
    there is none)."""
    own = torch.arange(steps)
    order = torch.randperm(steps, generator=generator)
    while steps > 1 and (order == own).any():
        order = torch.randperm(steps, generator=generator)
    return order


def placed_at_random(gates: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Open gates per step, ``(draws, T)``, if as many as in `gates` ``(T, n)`` lay anywhere: null
    of steps' needs."""
    drawn = torch.rand(draws, gates.numel(), generator=generator).argsort(dim=1) < int(gates.sum())
    return drawn.unflatten(1, gates.shape).sum(2)


def overlaps(gates: Tensor) -> Tensor:
    """Mean Jaccard overlap of each step's open gates with the other steps', ``(T,)`` of gates ``(T,
    n)``; 0..1.

    Pairs without an open gate are left out; nan where none is left.
    """
    return jaccard(gates).fill_diagonal_(torch.nan).nanmean(1)


def random_overlaps(gates: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """`overlaps` of random gates, as many a step as in `gates` ``(T, n)``: ``(draws, T)``."""
    drawn = torch.rand(draws, *gates.shape, generator=generator)
    return torch.stack([overlaps(best_of_step(scores, gates)) for scores in drawn])


def structure(gates: Tensor, draws: int, seed: int) -> dict[str, Tensor]:
    """What each step keeps and shares of the gates of one kind ``(T, n)``: numbers ``(T,)``.

    `kept`, its share of open gates, and the 95 % range `kept_null_low`, `kept_null_high` of random
    places; `overlap` with the other steps, and of random gates the mean `overlap_null` and the 95 %
    range beside it.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    placed = placed_at_random(gates, draws, generator).double() / gates.shape[1]
    random = random_overlaps(gates, draws, generator)
    found = {
        "kept": gates.double().mean(1),
        "overlap": overlaps(gates),
        "overlap_null": random.nanmean(0),
    }
    for name, null in (("kept", placed), ("overlap", random)):
        found[f"{name}_null_low"], found[f"{name}_null_high"] = null.nanquantile(ends, dim=0)
    return found


def _ranks(scores: Tensor) -> Tensor:
    """Ranks of a table's numbers, 0 (least) to 1, ``(T, n)`` float64; equal ones in order."""
    order = scores.flatten().argsort(stable=True).argsort().double()
    return (order / max(scores.numel() - 1, 1)).reshape(scores.shape)
