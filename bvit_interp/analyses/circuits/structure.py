"""Gates per step, and gates shared between steps, beside nulls.

All functions take tables of gates ``(T, n)`` of one site.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bvit_interp.analyses.circuits.choice import top_of_step
from bvit_interp.metrics import jaccard

_ENDS = (0.025, 0.975)


def structure(
    gates: Bool[Tensor, "steps units"], draws: int, seed: int
) -> dict[str, Float[Tensor, " steps"]]:
    """Share of open gates of each step and overlap with other steps.

    Parameters
    ----------
    draws : number of random tables of each null.
    seed : random seed for the nulls.

    Returns
    -------
    `kept`, the share of open gates, and `kept_null_low`, `kept_null_high`, the 95 % range if the
    open gates are at random steps; `overlap`, the mean overlap with other steps, and for random
    gates, as many at each step, the mean `overlap_null` and the 95 % range `overlap_null_low`,
    `overlap_null_high`.
    """
    generator = torch.Generator().manual_seed(seed)
    placed = random_counts(gates, draws, generator).double() / gates.shape[1]
    random = random_overlaps(gates, draws, generator)
    table = {
        "kept": gates.double().mean(1),
        "overlap": overlaps(gates),
        "overlap_null": random.nanmean(0),
    }
    ends = torch.tensor(_ENDS, dtype=torch.float64)
    for name, null in (("kept", placed), ("overlap", random)):
        table[f"{name}_null_low"], table[f"{name}_null_high"] = null.nanquantile(ends, dim=0)
    return table


def overlaps(gates: Bool[Tensor, "steps units"]) -> Float[Tensor, " steps"]:
    """Mean Jaccard overlap of each step's open gates with those of the other steps, 0..1.

    Pairs without an open gate are left out; nan where no pair is left.
    """
    return jaccard(gates).fill_diagonal_(torch.nan).nanmean(1)


def random_overlaps(
    gates: Bool[Tensor, "steps units"], draws: int, generator: torch.Generator
) -> Float[Tensor, "draws steps"]:
    """`overlaps` of random gates, as many at each step as in `gates`."""
    drawn = torch.rand(draws, *gates.shape, generator=generator)
    return torch.stack([overlaps(top_of_step(scores, gates)) for scores in drawn])


def random_counts(
    gates: Bool[Tensor, "steps units"], draws: int, generator: torch.Generator
) -> Int[Tensor, "draws steps"]:
    """Open gates of each step if as many as in `gates` are drawn from all steps and units."""
    order = torch.rand(draws, gates.numel(), generator=generator).argsort(dim=1)
    return (order < int(gates.sum())).unflatten(1, gates.shape).sum(2)
