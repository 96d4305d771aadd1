"""Perturbed runs beside the clean one: how far they get, in size and in direction, and whether the
answer stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from bvit_interp.analyses.stability.jacobian import finite, seeded_normal, size
from bvit_interp.models.stepping import State, advance, answer

Variant = tuple[Literal["random", "partner"], int, float]
"""Direction, step after which the state is moved, and by which share of its norm."""


def perturbed_runs(
    view: VisionTransformer,
    clean: State,
    other: State,
    index: Tensor,
    variants: Sequence[Variant],
    kinds: Sequence[slice],
    seed: int,
) -> dict[str, Tensor]:
    """Every variant of a run beside the clean one, from step 0 to the last.

    Parameters
    ----------
    view : an unroll of S steps.
    clean, other : step 0 of the images, and of the images that "partner" moves them towards.
    index : the images' places in the data set ``(B,)``, from which random directions are drawn.
    variants : the tokens of all of z_s are moved as one vector; a memory is left.
    kinds : the tokens of each kind that is read.

    Returns
    -------
    `distance` ``||z'_t - z_t|| / ||z_t||`` and `direction`, the root mean square over tokens of the
    distance between unit vectors, each ``(B, variants, S + 1, kinds)``, and `same_answer` ``(B,
    variants, S + 1)``; nan before a variant's start, and where the other state is the same. With
    `_null` the same of the other's own run, without the axis of variants.
    """
    random = seeded_normal(index.to(clean.tokens.device), clean.tokens.shape[1:], seed, 2).to(
        clean.tokens
    )
    runs: list[State | None] = [None] * len(variants)
    found: dict[str, list[Tensor]] = {}
    for step in range(len(view.blocks) + 1):
        if step:
            clean, other = advance(view, clean), advance(view, other)
            runs = [None if run is None else advance(view, run) for run in runs]
        for i, (source, start, eps) in enumerate(variants):
            if start == step:
                runs[i] = _moved(
                    clean, random if source == "random" else other.tokens - clean.tokens, eps
                )
        answers = answer(view, replace(clean, tokens=finite(clean.tokens))).argmax(-1)
        null, *each = (_compared(view, clean, answers, run, kinds) for run in (other, *runs))
        for key, values in null.items():
            found.setdefault(f"{key}_null", []).append(values)
            if each:
                found.setdefault(key, []).append(torch.stack([run[key] for run in each], dim=1))
    return {
        key: torch.stack(values, dim=1 if key.endswith("_null") else 2)
        for key, values in found.items()
    }


def _moved(state: State, change: Tensor, eps: float) -> State:
    scale = eps * size(state.tokens) / size(change)
    return replace(state, tokens=state.tokens + scale[:, None, None] * change)


def _compared(
    view: VisionTransformer,
    clean: State,
    answers: Tensor,
    run: State | None,
    kinds: Sequence[slice],
) -> dict[str, Tensor]:
    """How far a run is from the clean one ``(B, kinds)``, and whether it answers the same
    ``(B,)``."""
    if run is None:
        far = torch.full(
            (len(answers), len(kinds)), torch.nan, dtype=torch.float64, device=answers.device
        )
        return {"distance": far, "direction": far, "same_answer": far[:, 0]}
    own, tokens = clean.tokens.double(), run.tokens.double()
    apart = (
        (functional.normalize(tokens, dim=-1) - functional.normalize(own, dim=-1)).square().sum(-1)
    )
    same = (answer(view, run).argmax(-1) == answers).double()
    return {
        "distance": torch.stack(
            [size(tokens[:, kind] - own[:, kind]) / size(own[:, kind]) for kind in kinds], dim=1
        ),
        "direction": torch.stack([apart[:, kind].mean(1).sqrt() for kind in kinds], dim=1),
        "same_answer": torch.where(tokens.isfinite().all((1, 2)), same, torch.nan),
    }
