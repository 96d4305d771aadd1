"""Importance of weights, by magnitude or by their gradient's terms."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bvit_interp.analyses.step_attribution.untied import Layout
from bvit_interp.metrics.selection import drop_smallest

STEP_MASKS = ("own_masks", "shifted_masks")
"""Methods with a mask per step."""
NEED_SHARING = ("stepwise", "step_max", *STEP_MASKS)
"""Methods that differ from taylor only where steps share weights."""


def importance(
    method: str,
    terms: Float[Tensor, "steps weights"],
    weights: Float[Tensor, "blocks weights"],
    layout: Layout,
    seed: int = 0,
) -> Float[Tensor, "masks matrix_weights"]:
    """Scores of the weights of matrices; the least important are pruned first.

    Parameters
    ----------
    method : "magnitude" |w|, "taylor" |w sum_t g_t|, "stepwise" sum_t |w g_t|, "step_max" max_t |w
        g_t|, "random"; or with a mask per step: "own_masks" |w g_t|, "shifted_masks" |w g_s| with s
        the block's next step.
    terms : g_t of every step.
    seed : random seed for "random".

    Returns
    -------
    One row per stored block, or per step for the masks of steps.
    """
    weights = weights[:, : layout.matrix_weights]
    terms = terms[:, : layout.matrix_weights]
    if method == "magnitude":
        return weights.abs()
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
        return drawn.to(weights.device)
    if method in STEP_MASKS:
        following = {
            step: steps[(i + 1) % len(steps)]
            for steps in layout.steps_of_blocks
            for i, step in enumerate(steps)
        }
        sources = [
            following[step] if method == "shifted_masks" else step for step in range(len(terms))
        ]
        return torch.stack([(weights[layout.blocks[s]] * terms[s]).abs() for s in sources])
    rows = []
    for weight, steps in zip(weights, layout.steps_of_blocks, strict=True):
        if method == "taylor":
            rows.append((weight * terms[steps].sum(0)).abs())
        elif method == "stepwise":
            rows.append((weight * terms[steps]).abs().sum(0))
        elif method == "step_max":
            rows.append((weight * terms[steps]).abs().amax(0))
        else:
            raise ValueError(f"no method {method!r}")
    return torch.stack(rows)


def prune(
    scores: Float[Tensor, "masks matrix_weights"], method: str, sparsity: float
) -> Bool[Tensor, "masks matrix_weights"]:
    """Masks without the least important weights.

    Parameters
    ----------
    scores : of `importance`.
    sparsity : share of the weights to leave out, 0..1: of all blocks together, or of each step.
    """
    if method in STEP_MASKS:
        return drop_smallest(scores, round(sparsity * scores.shape[1]), dim=1)
    return drop_smallest(scores, round(sparsity * scores.numel()))
