"""Scores of gates on a set of images: by gradient, or learned.

- `Fit.slopes`: the mean over images of ``|d log p(own answer) / d gate|`` at open gates, the head
  importance of Michel et al. (2019, https://arxiv.org/abs/1905.10650) and a first-order attribution
  patch (Nanda, 2023). The model's own answer is used because the KL divergence from the whole model
  has no slope at open gates.
- `Fit.learned`: scores whose k largest gates are open and which descend ``KL(whole || gated)``. The
  gradient with respect to the gates goes straight through to the scores, also to those of closed
  gates (Ramanujan et al., 2020, https://arxiv.org/abs/1911.13299, for masks of weights). So k is
  exact; hard-concrete gates (Louizos et al., 2018) would need a penalty tuned to it.

Everything here is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from bvit_interp.analyses.circuits.choice import top_gates, top_units
from bvit_interp.analyses.circuits.gates import Gates
from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.divergence import kl_divergence

BATCH = 32
LEARNING_RATE = 0.05
"""Learning rate of Adam, falling to 0, for scores that start within 0..1."""
Result = TypeVar("Result")
Split = Callable[[Callable[[Tensor], Any], Tensor], list[Any]]
"""fn(compute, rows ``(B,)``) -> results of `compute` on all rows, or on parts of them in order."""


def unsplit(compute: Callable[[Tensor], Result], rows: Tensor) -> list[Result]:
    """The `Split` that computes all rows at once."""
    return [compute(rows)]


class Fit:
    """Images that gates are fitted to.

    Parameters
    ----------
    gates : the model.
    images : ``(n, 3, H, W)``, normalised; batches are moved to the model's device.
    mean : a closed unit gives its mean over these images, not zero.
    batch_size : images per batch, always the same ones together.
    split : splits a batch that does not fit in memory.

    Attributes
    ----------
    gates : the gates, with their means if `mean`.
    slopes : ``(T, U)`` float64 on the CPU, the mean over images of ``|d log p(own answer) / d
        gate|``.
    count : number of images n.

    Raises
    ------
    UserError
        For NaN in weights or activations.
    """

    def __init__(
        self,
        gates: Gates,
        images: Float[Tensor, "images channels height width"],
        mean: bool,
        batch_size: int = BATCH,
        split: Split = unsplit,
    ) -> None:
        self._images, self._split, self._device = images, split, gates.device
        self.count = len(images)
        self._batches = torch.arange(self.count).split(batch_size)
        self.gates = gates.with_fill(self._means(gates)) if mean else gates
        with torch.no_grad():
            whole = self._results(lambda rows: gates.probe(self._batch(rows)))
        self._whole = torch.cat(whole)
        slopes = self._results(
            lambda rows: self.gates.slopes(self._batch(rows)).double().abs().sum(0)
        )
        self.slopes = torch.stack(slopes).sum(0).cpu() / self.count
        check_finite(self.slopes, "weights or activations")

    def learned(self, share: float, same: bool, epochs: int) -> Float64[Tensor, "steps units"]:
        """Scores whose largest are the gates to keep open (`top_gates`; if `same`, `top_units`).

        They start as the ranks of `slopes`, scaled to 0..1 within a site. Of the start and the end
        of every epoch, the scores whose gates have the smallest KL over the images are returned.
        """
        choose = partial(top_units if same else top_gates, share=share)
        start = self.slopes.mean(0, keepdim=True) if same else self.slopes
        scores = self.gates.by_site(_scaled_ranks, start).expand_as(self.slopes).clone()
        adam = torch.optim.Adam([scores], lr=LEARNING_RATE)
        updates = epochs * len(self._batches)
        candidates = [(self.loss(self.gates.by_site(choose, scores)), scores.clone())]
        for i in range(updates):
            rows = self._batches[i % len(self._batches)]
            gradient = self._gradient(rows, self.gates.by_site(choose, scores))
            if same:
                gradient = gradient.mean(0).expand_as(scores).clone()
            scores.grad = gradient
            adam.param_groups[0]["lr"] = LEARNING_RATE * (1 - i / updates)
            adam.step()
            if (i + 1) % len(self._batches) == 0:
                loss = self.loss(self.gates.by_site(choose, scores))
                candidates.append((loss, scores.clone()))
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def loss(self, gates: Shaped[Tensor, "steps units"]) -> float:
        """Mean ``KL(whole || gated)`` of the images, nats."""
        with torch.no_grad():
            parts = self._results(lambda rows: self._divergence(rows, gates.float()))
        return float(torch.cat(parts).double().mean())

    def _means(self, gates: Gates) -> dict[str, Float[Tensor, "steps tokens ..."]]:
        parts = self._results(lambda rows: gates.sums(self._batch(rows)))
        return {
            site: (torch.stack([sums[site] for sums in parts]).sum(0) / self.count).float()
            for site in gates.sites
        }

    def _gradient(
        self, rows: Int[Tensor, " batch"], gates: Shaped[Tensor, "steps units"]
    ) -> Float64[Tensor, "steps units"]:
        """Gradient of the mean KL of a batch with respect to its gates."""

        def compute(part: Tensor) -> Tensor:
            share = gates.float().requires_grad_()
            loss = self._divergence(part, share).sum()
            return torch.autograd.grad(loss, share)[0].double()

        return torch.stack(self._split(compute, rows)).sum(0) / len(rows)

    def _divergence(
        self, rows: Int[Tensor, " batch"], share: Float[Tensor, "steps units"]
    ) -> Float[Tensor, " batch"]:
        """KL of each image, gates open by these shares."""
        gated = self.gates.logits(self._batch(rows), share.to(self.gates.device)[None])[0]
        return kl_divergence(self._whole[rows.to(gated.device)], gated)

    def _batch(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch channels height width"]:
        return self._images[rows].to(self._device)

    def _results(self, compute: Callable[[Tensor], Result]) -> list[Result]:
        """Results of all batches, or of their parts."""
        return [result for rows in self._batches for result in self._split(compute, rows)]


def _scaled_ranks(scores: Float[Tensor, "steps units"]) -> Float64[Tensor, "steps units"]:
    """Ranks of a table's scores, 0 (smallest) to 1; equal ones in order."""
    ranks = scores.flatten().argsort(stable=True).argsort().double()
    return (ranks / max(scores.numel() - 1, 1)).reshape(scores.shape)
