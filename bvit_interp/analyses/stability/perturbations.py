"""Perturbed runs beside the clean run: distance, direction, prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bvit_interp.analyses.stability.vectors import seeded_normal, state_norms
from bvit_interp.metrics.checks import check_finite
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import State, advance, answer

Perturbation = tuple[Literal["random", "partner"], int, float]
"""Direction, the step after which the state is moved, and by which share of its norm."""


def perturbed_runs(
    view: Model,
    clean: State,
    other: State,
    index: Int[Tensor, " batch"],
    perturbations: Sequence[Perturbation],
    kinds: Sequence[slice],
    seed: int,
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Every perturbation of a run beside the clean run, from step 0 to the last.

    Parameters
    ----------
    view : an unroll of S steps.
    clean, other : step 0 of the images, and of the images towards which "partner" moves them.
    index : positions of the images in the data set, from which random directions are drawn.
    perturbations : each moves all tokens of z_s as one vector. A memory is not moved.
    kinds : the tokens of each kind that is read.
    seed : of the random directions.

    Returns
    -------
    - `distance`, ``||z'_t - z_t|| / ||z_t||``, ``(B, perturbations, S + 1, kinds)``;
    - `direction_distance`, the root mean square over tokens of the distance between unit vectors,
      of the same shape;
    - `same_prediction`, 0 or 1, ``(B, perturbations, S + 1)``;
    - with `_null`, the same between the other image's clean run and this one, without the axis of
      perturbations.

    Values are nan before a perturbation's start, and where the other state is the same; those of
    `same_prediction` also for a model that has no classes.
    """
    random = seeded_normal(index.to(clean.tokens.device), clean.tokens.shape[1:], seed, 2)
    random = random.to(clean.tokens)
    runs: list[State | None] = [None] * len(perturbations)
    by_step: dict[str, list[Tensor]] = {}
    for step in range(len(view.blocks) + 1):
        if step:
            clean, other = advance(view, clean), advance(view, other)
            runs = [None if run is None else advance(view, run) for run in runs]
        for i, (source, start, share) in enumerate(perturbations):
            if start == step:
                change = random if source == "random" else other.tokens - clean.tokens
                runs[i] = _moved(clean, change, share)
        predicted = _predicted(view, replace(clean, tokens=check_finite(clean.tokens)))
        for metric, values in _compared(view, clean, predicted, other, kinds).items():
            by_step.setdefault(f"{metric}_null", []).append(values)
        compared = [_compared(view, clean, predicted, run, kinds) for run in runs]
        for metric in compared[0] if compared else ():
            stacked = torch.stack([values[metric] for values in compared], dim=1)
            by_step.setdefault(metric, []).append(stacked)
    return {
        metric: torch.stack(values, dim=1 if metric.endswith("_null") else 2)
        for metric, values in by_step.items()
    }


def _predicted(view: Model, state: State) -> Int[Tensor, " batch"]:
    """The most likely class; 0 for a model that gives features."""
    if not view.num_classes:
        return torch.zeros(len(state.tokens), dtype=torch.int64, device=state.tokens.device)
    return answer(view, state).argmax(-1)


def _moved(state: State, change: Tensor, share: float) -> State:
    """The state moved along `change` by a share of its norm."""
    scale = share * state_norms(state.tokens) / state_norms(change)
    return replace(state, tokens=state.tokens + scale[:, None, None] * change)


def _compared(
    view: Model,
    clean: State,
    predicted: Int[Tensor, " batch"],
    run: State | None,
    kinds: Sequence[slice],
) -> dict[str, Tensor]:
    """Distances of a run from the clean one ``(B, kinds)``, and whether its prediction is the same
    ``(B,)``; nan without a run."""
    if run is None:
        absent = torch.full(
            (len(predicted), len(kinds)), torch.nan, dtype=torch.float64, device=predicted.device
        )
        return {"distance": absent, "direction_distance": absent, "same_prediction": absent[:, 0]}
    reference, tokens = clean.tokens.double(), run.tokens.double()
    distance = [
        state_norms(tokens[:, kind] - reference[:, kind]) / state_norms(reference[:, kind])
        for kind in kinds
    ]
    unit, unit_reference = (functional.normalize(each, dim=-1) for each in (tokens, reference))
    chord = (unit - unit_reference).square().sum(-1)
    same = (_predicted(view, run) == predicted).double()
    if not view.num_classes:
        same = torch.full_like(same, torch.nan)
    return {
        "distance": torch.stack(distance, dim=1),
        "direction_distance": torch.stack([chord[:, kind].mean(1).sqrt() for kind in kinds], dim=1),
        "same_prediction": torch.where(tokens.isfinite().all((1, 2)), same, torch.nan),
    }
