"""Magnitude pruning: the smallest active weights of each mask are removed.

All methods share one rule. They differ in what ranks the entries of a mask: a graft, trained
weights or random numbers. `metrics.selection` decides which entries are removed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.metrics.selection import drop_smallest
from bvit_interp.models.masks import Masks


def prune_smallest(
    masks: Masks,
    weights: Mapping[str, Shaped[Tensor, "masks ..."]],
    rate: float,
    ranking: str = "global",
) -> Masks:
    """Masks without the share `rate` of their active weights that are smallest.

    Parameters
    ----------
    masks : K masks.
    weights : component -> ``(K, *shape)``; the absolute values of row k rank the entries of mask k.
    rate : of n active weights ``n - round(n (1 - rate))`` are removed, the first of equal ones.
    ranking : "global" ranks all components of a mask together, "layer" ranks each on its own.
    """
    groups = [list(masks)] if ranking == "global" else [[name] for name in masks]
    pruned = {name: mask.clone() for name, mask in masks.items()}
    for k in range(masks.count):
        for group in groups:
            active = torch.cat([masks[name][k].flatten() for name in group])
            size = torch.cat([weights[name][k].flatten() for name in group]).abs()
            count = int(active.sum())
            kept = active.clone()
            kept[active] = drop_smallest(size[active], count - round(count * (1 - rate)))
            lengths = [masks[name][k].numel() for name in group]
            for name, part in zip(group, kept.split(lengths), strict=True):
                pruned[name][k] = part.view_as(masks[name][k])
    return Masks(pruned, masks.blocks)


def prune_to(
    masks: Masks, weights: Mapping[str, Shaped[Tensor, "masks ..."]], sparsity: float
) -> Masks:
    """The masks pruned to a sparsity, by magnitude over all components together.

    Parameters
    ----------
    masks : K masks with equal numbers of active weights.
    weights : component -> ``(K, *shape)``.
    sparsity : share of all weights that is pruned afterwards, 0..1; at least what it is now.

    Raises
    ------
    UserError
        If nothing would be left.
    """
    size = sum(mask[0].numel() for mask in masks.values())
    left = round(size * (1 - sparsity))
    if not left:
        raise UserError(f"sparsity {sparsity} leaves none of the {size} weights of a mask")
    return prune_smallest(masks, weights, 1 - left / int(masks.flat(0).sum()))
