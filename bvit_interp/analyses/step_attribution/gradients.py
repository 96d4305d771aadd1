"""The gradient of shared weights, one term a step: dL/dW = sum_t dL/dW_t, and what it says of every
weight.

A recurrent block's gradient is a sum over the steps that apply it, and autograd hands over the sum
alone. `Untied` is a copy of the model whose every step has parameters of its own, equal in value;
their gradients are the terms, exactly. A stacked ViT goes the same way, each of its weights with
one term.

Importance is first-order, |w g|, how much the loss would change without the weight (Molchanov et
al., 2017, 2019, https://arxiv.org/abs/1906.10771); two terms of negative cosine are in conflict (Yu
et al., 2020, https://arxiv.org/abs/2001.06782).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.models.masks import PLACES
from bvit_interp.models.unroll import unroll

PARTS = ("q", "k", "v", "proj", "fc1", "fc2", "vectors", "all")
"""Parts of a block: its six weight matrices, all biases and norm weights together, and
everything."""

UNITS = ("head", "neuron")  # rows of q, k, v and columns of proj; a row of fc1 and a column of fc2
OF_STEPS = ("own_masks", "shifted_masks")  # methods of pruning with a mask a step
OF_SHARED = (
    "stepwise",
    "step_max",
    *OF_STEPS,
)  # those that differ from taylor only where steps share weights
MAX_BYTES = 2**34  # of the sums kept
# of a step's largest term: below is zero, as is the gradient of a key's bias, which softmax cancels
ROUNDING = 1e-12
T_95 = {
    4: 3.182,
    6: 2.571,
    8: 2.365,
    10: 2.262,
    12: 2.201,
    14: 2.160,
    16: 2.131,
}  # by folds: of Student's t


# ---- a copy whose steps share nothing ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layout:
    """A block's parameters in one row ``(P,)``: the four matrices of `PLACES` first, then the
    vectors.

    Attributes
    ----------
    blocks : which stored block each step applies, ``T`` ints.
    names, shapes : of the parameters, in order. A time embedding is left out: a row of it is one
        step's anyway.
    parts : name in `PARTS`, without "all" -> its place in the row.
    heads, neurons : head and neuron of every weight ``(P,)`` int64; H and F where it is of none.
    pruned : how many of them, from the first, are weights of matrices.
    """

    blocks: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    parts: dict[str, slice]
    heads: Tensor
    neurons: Tensor
    pruned: int

    @property
    def groups(self) -> list[list[int]]:
        """The steps (from 0) of each stored block."""
        return [
            [t for t, own in enumerate(self.blocks) if own == block]
            for block in range(max(self.blocks) + 1)
        ]


class Untied:
    """A copy of a model in which every step has parameters of its own; the model is never written.

    Inner updates of a memory belong to their step.

    Parameters
    ----------
    model : a `BViT` or any timm `VisionTransformer` with blocks of qkv, proj, fc1 and fc2, all of
        one shape.
    dtype : of the copy.

    Raises
    ------
    UserError
        For other blocks, and for weights that a pruning hook or a parametrization computes.
    """

    def __init__(self, model: VisionTransformer, dtype: torch.dtype = torch.float32) -> None:
        view = unroll(model)
        self.layout = _layout(view)
        view = copy.deepcopy(view)  # steps still tied to one another
        for i in range(len(view.blocks)):
            view.blocks[i] = copy.deepcopy(view.blocks[i])
        self.view = view.to(dtype).eval().requires_grad_(False)
        self.leaves = [
            [block.get_parameter(name) for name in self.layout.names] for block in view.blocks
        ]
        for leaf in (leaf for own in self.leaves for leaf in own):
            leaf.requires_grad_(True)
        stored = [steps[0] for steps in self.layout.groups]
        self.weights = torch.stack([_row(self.leaves[t]) for t in stored])
        """Parameters of each stored block, ``(blocks, P)``."""

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Terms ``(T, P)`` of the gradient of the cross-entropy, in nats, summed over the
        images."""
        with torch.enable_grad():
            logits = self.view(images.to(self.weights))
            loss = F.cross_entropy(logits, labels.to(self.weights.device), reduction="sum")
            found = torch.autograd.grad(loss, [leaf for own in self.leaves for leaf in own])
        count = len(self.layout.names)
        terms = torch.stack([_row(found[t : t + count]) for t in range(0, len(found), count)])
        if not torch.isfinite(terms).all():
            raise UserError("gradients hold NaN or infinite values")
        return terms

    @torch.no_grad()
    def keep(self, masks: Tensor | None) -> None:
        """Set every step's matrices to ``W * M_t``, of masks ``(T, pruned)`` or one for all steps
        of each block ``(blocks, pruned)``; None is the model again."""
        for t, block in enumerate(self.layout.blocks):
            kept, begin = self.weights[block, : self.layout.pruned], 0
            if masks is not None:
                kept = kept * masks[t if len(masks) == len(self.layout.blocks) else block].to(kept)
            for leaf in self.leaves[t][: len(PLACES)]:
                leaf.copy_(kept[begin : begin + leaf.numel()].view_as(leaf))
                begin += leaf.numel()


def _row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _layout(view: VisionTransformer) -> Layout:
    """The common layout of an unroll's blocks, or an error."""
    found, blocks, stored = [], list[int](), dict[int, int]()
    for t, block in enumerate(view.blocks, start=1):
        modules = dict(block.named_modules())
        own = {
            name: parameter
            for name, parameter in block.named_parameters()
            if not name.startswith("inner.") and name != "step_embed"
        }
        matrices = [f"{place}.weight" for place in PLACES.values()]
        plain = all(
            isinstance(modules.get(p), nn.Linear) and f"{p}.weight" in own for p in PLACES.values()
        )
        other = [
            name for name, parameter in own.items() if parameter.ndim > 1 and name not in matrices
        ]
        if not plain or other:
            wrong = (
                f"has {', '.join(other)} too"
                if other
                else "lacks some of them, or computes a weight from others"
            )
            raise UserError(
                f"step {t}: gradients are split over blocks of qkv, proj, fc1 and fc2; this {wrong}"
            )
        names = (*matrices, *(name for name in own if name not in matrices))
        found.append((names, tuple(own[name].shape for name in names)))
        blocks.append(stored.setdefault(id(own[matrices[0]]), len(stored)))
    if len(set(found)) > 1:
        raise UserError(
            "gradients of steps are compared weight by weight: the model's blocks differ in shape"
        )
    names, shapes = found[0]
    attention, vectors = view.blocks[0].attn, sum(shape.numel() for shape in shapes[4:])
    sizes = [*[shapes[0].numel() // 3] * 3, *(shape.numel() for shape in shapes[1:4]), vectors]
    ends = list(itertools.accumulate(sizes))
    parts = {
        part: slice(end - size, end) for part, size, end in zip(PARTS, sizes, ends, strict=False)
    }
    head, neuron = torch.arange(shapes[0][0] // 3) // attention.head_dim, torch.arange(shapes[2][0])
    heads = torch.full((ends[-1],), attention.num_heads)
    heads[: ends[3]] = torch.cat(
        [head.repeat_interleave(shapes[0][1]).repeat(3), head.repeat(shapes[1][0])]
    )
    neurons = torch.full((ends[-1],), len(neuron))
    neurons[ends[3] : ends[5]] = torch.cat(
        [neuron.repeat_interleave(shapes[2][1]), neuron.repeat(shapes[3][0])]
    )
    return Layout(tuple(blocks), names, shapes, parts, heads, neurons, ends[5])


# ---- over a data set -----------------------------------------------------------------------------------


class StepGradients(Metric):
    """Terms of the gradient summed over the images of each fold, in float64.

    Parameters
    ----------
    folds, steps, size : F, T and P; F T P numbers of 8 bytes are kept.

    Returns
    -------
    ``compute``: sums ``(F, T, P)`` and images ``(F,)``, float64.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, folds: int, steps: int, size: int) -> None:
        super().__init__()
        if (held := 8 * folds * steps * size) > MAX_BYTES:
            raise UserError(
                f"sums of {folds} folds of images would take {held / 2**30:.0f} GiB: take fewer folds"
            )
        for name, shape in (("total", (folds, steps, size)), ("count", (folds,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, fold: int, terms: Tensor, images: int) -> None:
        """Add terms ``(T, P)`` summed over `images` of one fold."""
        self.total[fold] += terms
        self.count[fold] += images

    def compute(self) -> tuple[Tensor, Tensor]:
        """The sums of all processes."""
        if not self.count.all():
            raise UserError("a fold of the images is empty: take more images or fewer folds")
        return self.total, self.count


def halves_of(total: Tensor, count: Tensor, without: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean terms ``(2, T, P)`` and images ``(2,)`` of the even folds and of the odd, of the sums
    and images of all, one fold perhaps left out."""
    own = [[fold for fold in range(half, len(total), 2) if fold != without] for half in (0, 1)]
    images = torch.stack([count[folds].sum() for folds in own])
    return torch.stack([total[folds].sum(0) for folds in own]) / images[:, None, None], images


def noise_norm(total: Tensor, count: Tensor, layout: Layout) -> Tensor:
    """Norm that each part's mean gradient would have by the choice of images alone, were the true
    one zero, ``(T, parts)``: ``sqrt(sum_f ||g_f - g||^2 / (F (F - 1)))`` over the folds' means."""
    folds, mean = len(total), total.sum(0) / count.sum()
    apart = sum(
        _by_part((of_fold / n - mean).square(), layout)
        for of_fold, n in zip(total, count, strict=True)
    )
    return (torch.as_tensor(apart) / (folds * (folds - 1))).sqrt()


# ---- what the terms say --------------------------------------------------------------------------------


# of a block's measures, how many of the first axes are steps; of others the first is the block
_STEP_AXES = {
    "head_share": 1,
    "head_taylor": 1,
    "neuron_share": 1,
    "owner": 1,
    "cosine": 2,
    "cosine_apart": 2,
}


def describe(halves: Tensor, count: Tensor, weights: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Measures of the terms g_t; P' is the `PARTS`, B the stored blocks.

    Parameters
    ----------
    halves : mean terms ``(2, T, P)`` of two halves of the images; `count` ``(2,)`` of them.
    weights : ``(B, P)``.

    Returns
    -------
    Of all steps: `norm` ||g_t||, `share` of the sum of squared norms, `taylor` share of the sum of
    |w g_t|, each ``(T, P')``. The rest is of steps that share a block, nan at one that does not,
    and missing if none does:

    - `head_share`, `head_taylor` ``(T, H)``, `neuron_share` ``(T, F)``; `owner` ``(T, P' + 2)``,
      the share of weights, of heads and of neurons whose g_t^2 is largest at this step; `cosine`
      ``(T, T, P')`` of two terms, `cosine_apart` of terms of different halves of the images, whose
      diagonal is the ceiling;
    - `entropy` ``(B, P' + 2)`` of a weight's (head's, neuron's) g_t^2 over its steps, over log of
      their number, mean; `head_entropy` ``(B, H)``, `neuron_entropy` ``(B, F)``; and ``(B, P')``
      `sum_ratio` ``||sum_t g_t||^2 / sum_t ||g_t||^2``, `owner_agreement`, the share of weights
      with the same owner in both halves, and its `agreement_null` of independent owners.
    """
    halves = torch.where(halves.abs() > ROUNDING * halves.abs().amax(-1, keepdim=True), halves, 0.0)
    terms = (halves * (count / count.sum())[:, None, None]).sum(0)
    squared, change = _by_part(terms.square(), layout), (weights[list(layout.blocks)] * terms).abs()
    found = {
        "norm": squared.sqrt(),
        "share": _share(squared),
        "taylor": _share(_by_part(change, layout)),
    }
    for b, own in enumerate(layout.groups):
        if len(own) < 2:
            continue
        for key, value in _of_block(terms[own], halves[:, own], change[own], layout).items():
            axes = _STEP_AXES.get(key, 0)
            whole = [len(layout.blocks)] * axes or [len(layout.groups)]
            found.setdefault(key, value.new_full((*whole, *value.shape[axes:]), torch.nan))
            steps = torch.tensor(own)
            found[key][(b, steps, (steps[:, None], steps))[axes]] = value
    return found


def _of_block(terms: Tensor, halves: Tensor, change: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Measures of the steps S that share a block, of their terms ``(S, P)``; shapes as in
    `describe`."""
    squared = terms.square()
    heads, neurons = (_by_unit(squared, unit) for unit in (layout.heads, layout.neurons))
    each = {"head_entropy": _entropy(heads), "neuron_entropy": _entropy(neurons)}
    means = [
        _by_part(_entropy(squared)[None], layout, mean=True)[0],
        *(e.nanmean()[None] for e in each.values()),
    ]
    gram, across = _grams(terms, terms, layout), _grams(halves[0], halves[1], layout)
    lengths, (first, second) = (
        _lengths(gram),
        (_lengths(_grams(half, half, layout)) for half in halves),
    )
    across = across / (first[:, None] * second)
    owners, shares = halves.square().argmax(1), [_owners(half.square(), layout) for half in halves]
    same = torch.where(halves.any(1).all(0), (owners[0] == owners[1]).to(terms), torch.nan)
    return each | {
        "head_share": _share(heads),
        "neuron_share": _share(neurons),
        "head_taylor": _share(_by_unit(change, layout.heads)),
        "entropy": torch.cat(means),
        "owner": torch.cat([_owners(squared, layout), _largest(heads), _largest(neurons)], 1),
        "cosine": gram / (lengths[:, None] * lengths),
        "cosine_apart": (across + across.transpose(0, 1)) / 2,
        "sum_ratio": gram.sum((0, 1)) / gram.diagonal().sum(-1),
        "owner_agreement": _by_part(same[None], layout, mean=True)[0],
        "agreement_null": (shares[0] * shares[1]).sum(0),
    }


def shuffled(terms: Tensor, layout: Layout, seed: int) -> Tensor:
    """Terms ``(..., T, P)``, those of each step in an order of its own within each part: the null
    in which a weight's terms have nothing to do with one another, and the steps' norms stay."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.empty_like(terms)
    for cut in layout.parts.values():
        for t in range(terms.shape[-2]):
            order = torch.randperm(cut.stop - cut.start, generator=generator).to(terms.device)
            mixed[..., t, cut] = terms[..., t, cut][..., order]
    return mixed


def shuffled_cosine(terms: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(T, T, parts)`` of the cosine of two terms ``(T, P)`` over all
    orders of their weights, in closed form (a permutation test's); too narrow for gradients of low
    rank, whose weights go together."""
    cuts = [*layout.parts.values(), slice(None)]
    means = torch.stack([terms[:, cut].mean(1) for cut in cuts], 1)
    squares = torch.stack([terms[:, cut].square().mean(1) for cut in cuts], 1)
    spread = (squares - means.square()).clamp(min=0).sqrt()
    sizes = torch.tensor([terms[:, cut].shape[1] for cut in cuts], device=terms.device)
    lengths = squares.sqrt()[:, None] * squares.sqrt()
    deviation = spread[:, None] * spread / (sizes - 1).sqrt() / lengths
    return means[:, None] * means / lengths, deviation


def jackknife(values: Tensor) -> Tensor:
    """Half a 95 % interval ``(...)`` of a measure, of its values with one fold left out each ``(F,
    ...)``: Student's t times the standard error of the delete-one-group jackknife (Quenouille,
    1949; Tukey, 1958)."""
    folds = len(values)
    return T_95[folds] * ((values - values.mean(0)).square().sum(0) * (folds - 1) / folds).sqrt()


def _by_part(values: Tensor, layout: Layout, mean: bool = False) -> Tensor:
    """Sums, or means without nan, of ``(T, P)`` over each of the `PARTS`."""
    reduce = torch.nanmean if mean else torch.sum
    return torch.stack(
        [reduce(values[:, cut], dim=1) for cut in (*layout.parts.values(), slice(None))], 1
    )


def _by_unit(values: Tensor, unit: Tensor) -> Tensor:
    """Sums of ``(T, P)`` over each head or neuron; the last number stands for weights of none."""
    count = int(unit.max())
    return values.new_zeros(len(values), count + 1).index_add_(1, unit.to(values.device), values)[
        :, :count
    ]


def _grams(first: Tensor, second: Tensor, layout: Layout) -> Tensor:
    of_parts = torch.stack([first[:, cut] @ second[:, cut].T for cut in layout.parts.values()], -1)
    return torch.cat([of_parts, of_parts.sum(-1, keepdim=True)], -1)


def _lengths(gram: Tensor) -> Tensor:
    """Norms ``(T, parts)`` of the terms of `_grams`."""
    return gram.diagonal().T.sqrt()


def _share(values: Tensor) -> Tensor:
    return values / values.sum(0)


def _entropy(values: Tensor) -> Tensor:
    """Entropy of the shares of ``(S, ...)`` over the first axis, of log S: 0 for one step alone, 1
    for all equal."""
    return torch.special.entr(_share(values)).sum(0) / math.log(len(values))


def _largest(values: Tensor) -> Tensor:
    """Share of columns, those of zeros left out, whose largest value is in each row, ``(S, 1)``."""
    owners = values.argmax(0)[values.any(0)]
    return torch.bincount(owners, minlength=len(values)).to(values)[:, None] / len(owners)


def _owners(squared: Tensor, layout: Layout) -> Tensor:
    """Share of each part's weights whose largest value is in each row, ``(S, parts)``."""
    return torch.cat(
        [_largest(squared[:, cut]) for cut in (*layout.parts.values(), slice(None))], 1
    )


# ---- pruning -------------------------------------------------------------------------------------------


def ranking(method: str, terms: Tensor, weights: Tensor, layout: Layout, seed: int = 0) -> Tensor:
    """Order in which a method prunes the weights of matrices, 0 first.

    Parameters
    ----------
    method : "magnitude" |w|, "taylor" |w sum_t g_t|, "stepwise" sum_t |w g_t|, "step_max" max_t |w
        g_t|, "random"; or a mask a step: "own_masks" by |w g_t|, "shifted_masks" by the same of the
        block's next step.
    terms, weights : ``(T, P)`` and ``(B, P)``.

    Returns
    -------
    int32 ``(B, pruned)``, one order over all blocks; for masks of steps ``(T, pruned)``, an order
    in each step.
    """
    weights, terms = weights[:, : layout.pruned], terms[:, : layout.pruned]
    if method in OF_STEPS:
        after = {t: own[(i + 1) % len(own)] for own in layout.groups for i, t in enumerate(own)}
        source = [after[t] if method == "shifted_masks" else t for t in range(len(terms))]
        return torch.stack([_order((weights[layout.blocks[s]] * terms[s]).abs()) for s in source])
    if method == "random":
        chance = torch.rand(
            weights.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return _order(chance.to(weights.device))
    if method == "magnitude":
        return _order(weights.abs())
    change = [(weights[b] * terms[own]).abs() for b, own in enumerate(layout.groups)]
    if method == "taylor":
        change = [
            (weights[b] * terms[own].sum(0)).abs()[None] for b, own in enumerate(layout.groups)
        ]
    return _order(
        torch.stack([each.amax(0) if method == "step_max" else each.sum(0) for each in change])
    )


def _order(scores: Tensor) -> Tensor:
    """Rank of every score, 0 the least; equal ones in order."""
    flat = scores.flatten()
    ranks = torch.empty(len(flat), dtype=torch.int32, device=flat.device)
    ranks[flat.argsort(stable=True)] = torch.arange(
        len(flat), dtype=torch.int32, device=flat.device
    )
    return ranks.reshape(scores.shape)


def kept(ranks: Tensor, method: str, sparsity: float) -> Tensor:
    """Masks of a `ranking` that leave out `sparsity` of the weights, 0..1: over all blocks, or of
    each step."""
    total = ranks.shape[1] if method in OF_STEPS else ranks.numel()
    return ranks >= round(sparsity * total)
