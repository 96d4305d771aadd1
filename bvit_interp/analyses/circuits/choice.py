"""Which gates stay open, from tables of scores.

All functions take and return tables ``(T, n)`` over steps and the units of one site.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bvit_interp.metrics.selection import keep_largest


def top_gates(scores: Float[Tensor, "steps units"], share: float) -> Bool[Tensor, "steps units"]:
    """The round(share T n) largest scores of all steps; of equal ones the first."""
    return keep_largest(scores, round(share * scores.numel()))


def top_units(scores: Float[Tensor, "steps units"], share: float) -> Bool[Tensor, "steps units"]:
    """As many gates as `top_gates`: at every step the units with the largest sums over steps.

    Gates that remain when their number is divided by T go to the next unit, at evenly spaced steps.
    """
    steps, totals = len(scores), scores.sum(0)
    everywhere, rest = divmod(round(share * scores.numel()), steps)
    at_every_step = keep_largest(totals, everywhere)
    chosen = at_every_step.expand_as(scores).clone()
    next_unit = keep_largest(totals, everywhere + 1) & ~at_every_step
    for i in range(rest):
        chosen[i * steps // rest] |= next_unit
    return chosen


def top_of_step(
    scores: Float[Tensor, "steps units"], like: Bool[Tensor, "steps units"]
) -> Bool[Tensor, "steps units"]:
    """The largest scores of each step, as many as the gates `like` have at that step."""
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < like.sum(1, keepdim=True)


def derangement(steps: int, generator: torch.Generator) -> Int[Tensor, " steps"]:
    """Random order of the steps in which none stays in place (a single step does)."""
    identity = torch.arange(steps)
    order = torch.randperm(steps, generator=generator)
    while steps > 1 and (order == identity).any():
        order = torch.randperm(steps, generator=generator)
    return order
