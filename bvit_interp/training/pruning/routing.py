"""Training and prediction of subnetworks, each routed by its known subset.

Algorithm 2 of Routing the Lottery (arXiv 2601.22141): on a batch of subset k, ``theta <- theta -
eta (grad * m_k)``. Pruned weights do not move; `masked_adam.py` describes this rule for Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.training.loop import build, feed
from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.throughput import precision
from bvit_interp.training.pruning.graft_training import shortened_recipe
from bvit_interp.training.pruning.masked_adam import MaskedAdam
from bvit_interp.training.pruning.subnetworks import Subnets
from bvit_interp.training.pruning.subset_batches import Batches
from bvit_interp.training.pruning.subsets import Pool

Route = tuple[Subnets, int, int]
"""Subnetworks, the subset to predict for, and the subset whose mask is used."""


def train(
    subnets: Subnets,
    batches: Batches,
    recipe: Recipe,
    device: str,
    advance: Callable[[], object] = lambda: None,
) -> float:
    """Train in place over all batches, and return the mean loss of the last quarter of them.

    Warm-up and cosine take the same shares of the steps as in the recipe. Weight decay, clipping,
    label smoothing and bf16 are the recipe's.

    Parameters
    ----------
    subnets : the subnetworks of the parts of `batches`, in the same order.
    advance : called after each step.

    Raises
    ------
    UserError
        For a loss that is not finite.
    """
    module = subnets.module.train()
    undecayed: set[str] = getattr(module, "no_weight_decay", set)()
    groups = [{"params": list(module.parameters()), "weight_decay": recipe.weight_decay}]
    if not recipe.decay_all:
        groups = param_groups_weight_decay(
            module, recipe.weight_decay, no_weight_decay_list=undecayed
        )
    optimizer = MaskedAdam(groups, lr=recipe.lr)
    schedule = build.schedule(
        optimizer, replace(shortened_recipe(recipe, 1), schedule="step"), len(batches)
    )
    losses: list[Tensor] = []
    drop: Any = getattr(module, "patch_drop", None)
    for j, (images, labels) in enumerate(feed.batches(cast("Any", batches), 0, recipe.workers)):
        k = j % len(batches.parts)
        schedule.step_update(j)
        if hasattr(drop, "prob"):
            drop.prob = recipe.patch_drop(recipe.epochs * j / len(batches))
        with seeded(*batches.key, j), _autocast(recipe, device):
            loss = subnets.loss(images.to(device), labels.to(device), k, recipe.label_smoothing)
            loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip or math.inf)
        optimizer.step(subnets.kept[k])
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        advance()
    tail = torch.stack(losses[-max(len(losses) // 4, 1) :]).float().mean().item()
    if not math.isfinite(tail):
        raise UserError(f"the loss is {tail}: a lower lr, or autocast=off")
    return tail


@torch.inference_mode()
def predict(
    routes: Sequence[Route], pool: Pool, view: Geometry, device: str, size: int = 250
) -> Float[Tensor, "routes images"]:
    """The prediction of every route for every image, ``(routes, n)`` float32.

    It is the logit of a one-vs-rest subset, or the number of the predicted class.

    Parameters
    ----------
    routes : each as in `Route`.
    pool : images.
    view : how images are brought to the model's size.
    device : device of the subnetworks.
    size : images per batch.
    """
    weights = [subnets.weights(mask) for subnets, _, mask in routes]
    for subnets, _, _ in routes:
        subnets.module.eval()
    predictions = []
    for begin in range(0, len(pool), size):
        chosen = range(begin, min(begin + size, len(pool)))
        images = torch.stack([view(pool.read(i))[0] for i in chosen]).to(device)
        rows = []
        for (subnets, k, _), masked in zip(routes, weights, strict=True):
            logits = subnets(images, k, masked)
            rows.append((logits if logits.ndim == 1 else logits.argmax(1)).float().cpu())
        predictions.append(torch.stack(rows))
    return torch.cat(predictions, 1)


def _autocast(recipe: Recipe, device: str) -> torch.autocast:
    on = precision(recipe.autocast, device) != "off"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=on)
