"""What the terms of a shared weight's gradient have in common.

The gradient of a shared weight is the sum of one term g_t per step. Importance is first-order,
|w g|: how much the loss would change without the weight (Molchanov et al., 2017, 2019,
https://arxiv.org/abs/1906.10771). Two terms of negative cosine are in conflict (Yu et al., 2020,
https://arxiv.org/abs/2001.06782).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.analyses.step_attribution.untied import LAYERS, Layout

UNITS = ("head", "neuron")
"""Rows of q, k, v and columns of proj; a row of fc1 and a column of fc2."""
GROUPS = (*LAYERS, *UNITS)
"""What the measures `entropy` and `owner` are taken over."""
# relative to a step's largest term: smaller ones count as zero, like the gradient of a key's bias,
# which softmax cancels
ROUNDING = 1e-12


def describe(
    halves: Float[Tensor, "2 steps weights"],
    images: Float[Tensor, " 2"],
    weights: Float[Tensor, "blocks weights"],
    layout: Layout,
) -> dict[str, Tensor]:
    """All measures of the terms; T steps, B stored blocks, L = 8 `LAYERS`, H heads, F neurons.

    Parameters
    ----------
    halves : mean terms over each half of the images.
    images : images in each half.
    weights : the parameters of each stored block.

    Returns
    -------
    Measures by name. Those that compare the steps of a block are nan for a block of one step, and
    absent if there is no other block:

    - `norm`, `share` of squared norms and `taylor`, share of sum |w g_t|, ``(T, L)``; `head_share`,
      `head_taylor` ``(T, H)``, `neuron_share` ``(T, F)``;
    - `owner` ``(T, L + 2)``: the share of weights (heads, neurons) with their largest g_t^2 at the
      step;
    - `cosine` ``(T, T, L)`` of two terms, and `cosine_apart`, between terms of different halves;
    - `entropy` ``(B, L + 2)`` of g_t^2 over the steps, divided by the log of their number, mean
      over weights (heads, neurons); `head_entropy` ``(B, H)``, `neuron_entropy` ``(B, F)``;
    - ``(B, L)``: `sum_ratio` ``||sum_t g_t||^2 / sum_t ||g_t||^2``; `owner_agreement`, the share of
      weights with the same owner in both halves; `agreement_null`, the same share for independent
      owners.
    """
    largest = halves.abs().amax(-1, keepdim=True)
    halves = torch.where(halves.abs() > ROUNDING * largest, halves, 0.0)
    terms = (halves * (images / images.sum())[:, None, None]).sum(0)
    squared = _by_layer(terms.square(), layout)
    change = (weights[list(layout.blocks)] * terms).abs()
    measures = {
        "norm": squared.sqrt(),
        "share": _share(squared),
        "taylor": _share(_by_layer(change, layout)),
    }
    steps_count, blocks_count = len(layout.blocks), len(layout.steps_of_blocks)
    for block, steps in enumerate(layout.steps_of_blocks):
        if len(steps) < 2:
            continue
        at = torch.tensor(steps)
        by_step, by_pair, by_block = _compare_steps(
            terms[steps], halves[:, steps], change[steps], layout
        )
        for key, value in by_step.items():
            empty = value.new_full((steps_count, *value.shape[1:]), torch.nan)
            measures.setdefault(key, empty)[at] = value
        for key, value in by_pair.items():
            empty = value.new_full((steps_count, steps_count, *value.shape[2:]), torch.nan)
            measures.setdefault(key, empty)[at[:, None], at] = value
        for key, value in by_block.items():
            empty = value.new_full((blocks_count, *value.shape), torch.nan)
            measures.setdefault(key, empty)[block] = value
    return measures


def shuffled(
    terms: Float[Tensor, "*batch steps weights"], layout: Layout, seed: int
) -> Float[Tensor, "*batch steps weights"]:
    """The terms of each step with their weights in random order within each layer.

    This is the null in which the terms of a weight are unrelated while the steps keep their norms.
    """
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.empty_like(terms)
    for layer in layout.layers.values():
        for step in range(terms.shape[-2]):
            order = torch.randperm(layer.stop - layer.start, generator=generator)
            mixed[..., step, layer] = terms[..., step, layer][..., order.to(terms.device)]
    return mixed


def shuffled_cosine(
    terms: Float[Tensor, "steps weights"], layout: Layout
) -> tuple[Float[Tensor, "steps steps layers"], Float[Tensor, "steps steps layers"]]:
    """Mean and standard deviation of the cosine of two terms over all orders of their weights.

    In closed form (the permutation distribution). It is too narrow for gradients of low rank, whose
    weights are correlated.
    """
    rows = [terms[:, each] for each in layout.slices]
    means = torch.stack([row.mean(1) for row in rows], 1)
    squares = torch.stack([row.square().mean(1) for row in rows], 1)
    deviations = (squares - means.square()).clamp(min=0).sqrt()
    sizes = torch.tensor([row.shape[1] for row in rows], device=terms.device)
    lengths = squares.sqrt()[:, None] * squares.sqrt()
    spread = deviations[:, None] * deviations / (sizes - 1).sqrt() / lengths
    return means[:, None] * means / lengths, spread


Measures = dict[str, Tensor]


def _compare_steps(
    terms: Tensor, halves: Tensor, change: Tensor, layout: Layout
) -> tuple[Measures, Measures, Measures]:
    """Measures of the S steps that share a block: per step, per pair of steps, and of the block."""
    squared = terms.square()
    heads, neurons = (_by_unit(squared, unit) for unit in (layout.heads, layout.neurons))
    head_entropy, neuron_entropy = _entropy(heads), _entropy(neurons)
    layer_entropy = _mean_by_layer(_entropy(squared), layout)
    unit_entropy = torch.stack([head_entropy.nanmean(), neuron_entropy.nanmean()])
    gram = _grams(terms, terms, layout)
    across = _grams(halves[0], halves[1], layout)
    norms, (first_norms, second_norms) = (
        _norms(gram),
        (_norms(_grams(half, half, layout)) for half in halves),
    )
    across = across / (first_norms[:, None] * second_norms)
    owners = halves.square().argmax(1)
    has_gradient = halves.any(1).all(0)
    same_owner = torch.where(has_gradient, (owners[0] == owners[1]).to(terms), torch.nan)
    owner_shares = [_owner_shares(half.square(), layout) for half in halves]
    by_step = {
        "head_share": _share(heads),
        "neuron_share": _share(neurons),
        "head_taylor": _share(_by_unit(change, layout.heads)),
        "owner": torch.cat([_owner_shares(squared, layout), _largest(heads), _largest(neurons)], 1),
    }
    by_pair = {
        "cosine": gram / (norms[:, None] * norms),
        "cosine_apart": (across + across.transpose(0, 1)) / 2,
    }
    by_block = {
        "head_entropy": head_entropy,
        "neuron_entropy": neuron_entropy,
        "entropy": torch.cat([layer_entropy, unit_entropy]),
        "sum_ratio": gram.sum((0, 1)) / gram.diagonal().sum(-1),
        "owner_agreement": _mean_by_layer(same_owner, layout),
        "agreement_null": (owner_shares[0] * owner_shares[1]).sum(0),
    }
    return by_step, by_pair, by_block


def _by_layer(values: Float[Tensor, "steps weights"], layout: Layout) -> Tensor:
    """Sums over each of the `LAYERS`, ``(steps, L)``."""
    return torch.stack([values[:, each].sum(1) for each in layout.slices], 1)


def _mean_by_layer(values: Float[Tensor, " weights"], layout: Layout) -> Tensor:
    """Means over each of the `LAYERS` without nan, ``(L,)``."""
    return torch.stack([values[each].nanmean() for each in layout.slices])


def _by_unit(values: Float[Tensor, "steps weights"], unit: Int[Tensor, " weights"]) -> Tensor:
    """Sums over each head or neuron; the last number stands for weights that belong to none."""
    count = int(unit.max())
    sums = values.new_zeros(len(values), count + 1)
    return sums.index_add_(1, unit.to(values.device), values)[:, :count]


def _grams(first: Tensor, second: Tensor, layout: Layout) -> Tensor:
    """Products of every two terms over each of the `LAYERS`, ``(S, S, L)``."""
    products = [first[:, layer] @ second[:, layer].T for layer in layout.layers.values()]
    by_layer = torch.stack(products, -1)
    return torch.cat([by_layer, by_layer.sum(-1, keepdim=True)], -1)


def _norms(gram: Tensor) -> Tensor:
    """Norms ``(S, L)`` of the terms of `_grams`."""
    return gram.diagonal().T.sqrt()


def _share(values: Tensor) -> Tensor:
    return values / values.sum(0)


def _entropy(values: Tensor) -> Tensor:
    """Entropy of the shares of ``(S, ...)`` over the first axis, divided by log S.

    0 if one step has all, 1 if all steps are equal.
    """
    return torch.special.entr(_share(values)).sum(0) / math.log(len(values))


def _largest(values: Tensor) -> Tensor:
    """Share of columns whose largest value is in each row, ``(S, 1)``; columns of zeros are left
    out."""
    owners = values.argmax(0)[values.any(0)]
    return torch.bincount(owners, minlength=len(values)).to(values)[:, None] / len(owners)


def _owner_shares(squared: Tensor, layout: Layout) -> Tensor:
    """Share of each layer's weights whose largest value is in each row, ``(S, L)``."""
    return torch.cat([_largest(squared[:, each]) for each in layout.slices], 1)
