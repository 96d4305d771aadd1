"""Gates of all conditions of a circuit, equally many open."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from bvit_interp.analyses.circuits.choice import derangement, top_gates, top_of_step, top_units
from bvit_interp.analyses.circuits.fit import Fit

DRAWN = ("shuffled", "shuffled-units", "random", "even-random", "same-random")
"""Conditions whose gates are drawn at random, `draws` times. The first two share the orders of the
steps, the others the random numbers."""


def conditions(
    fit: Fit, method: str, share: float, epochs: int, draws: int, seed: int
) -> dict[str, Bool[Tensor, "variants steps units"]]:
    """Gates of every condition; all have as many open gates of each site.

    - `per-step`: the circuit, by "gradient" or "learned" scores.
    - `even`: as many units at every step, each step's best.
    - `all-steps`: the same units at every step.
    - `shuffled`: at each step the gates of another step.
    - `shuffled-units`: each step's own number of units, those that another step ranks first.
    - `random`: each step's own number of random units.
    - `even-random`: random units, as many at every step.
    - `same-random`: the same random units at every step.

    Those of `DRAWN` have `draws` variants, the others one.
    """
    gates, generator = fit.gates, torch.Generator().manual_seed(seed)
    orders = [derangement(gates.steps, generator) for _ in range(draws)]
    chance = torch.rand(draws, gates.steps, gates.units, generator=generator)
    scores, same_scores = fit.slopes, fit.slopes
    if method == "learned":
        scores = fit.learned(share, same=False, epochs=epochs)
        same_scores = fit.learned(share, same=True, epochs=epochs)
    per_step = gates.by_site(partial(top_gates, share=share), scores)
    all_steps = gates.by_site(partial(top_units, share=share), same_scores)
    top = partial(gates.by_site, top_of_step)
    same_random = [gates.by_site(partial(top_units, share=share), drawn) for drawn in chance]
    return {
        "per-step": per_step[None],
        "even": top(scores, all_steps)[None],
        "all-steps": all_steps[None],
        "shuffled": torch.stack([per_step[order] for order in orders]),
        "shuffled-units": torch.stack([top(scores[order], per_step) for order in orders]),
        "random": torch.stack([top(drawn, per_step) for drawn in chance]),
        "even-random": torch.stack([top(drawn, all_steps) for drawn in chance]),
        "same-random": torch.stack(same_random),
    }
