"""What the masks of several steps share of one block's weights, beside what independent masks
would.

Section 4.2.3 and Appendix G of bViT (arXiv 2605.10661). The nulls are ours: masks as dense in every
step and component, each drawn by itself. Random masks too grow "specialised" as they are thinned
out. Steps that apply different stored blocks (a hybrid's, a stack's) share nothing and are never
compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.metrics.statistics import Z_95
from bvit_interp.models.masks import Masks

ALL = "all"
"""The components together."""


@dataclass(frozen=True)
class Compared:
    """Numbers ``(n,)`` float64, each beside its null.

    Parameters
    ----------
    value : of the masks.
    null : expected of independent masks of the same densities.
    spread : standard deviation of the null if every weight is drawn by itself; masks of fixed sizes
        vary less.
    count : weights of which the value is a share.
    """

    value: Tensor
    null: Tensor
    spread: Tensor
    count: Tensor

    @classmethod
    def shares(cls, found: Tensor, count: Tensor) -> Compared:
        """Value and null ``(2, n)``: shares of `count` weights, each hit with the null's
        probability if independent."""
        value, null = found
        return cls(value, null, (null * (1 - null) / count).sqrt(), count)

    @classmethod
    def stack(cls, parts: Sequence[Compared]) -> Compared:
        """Several of one length, ``(parts, n)``."""
        return cls(
            *(
                torch.stack([getattr(part, name) for part in parts])
                for name in cls.__dataclass_fields__
            )
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Compared:
        """The same with all columns changed alike."""
        return Compared(
            change(self.value), change(self.null), change(self.spread), change(self.count)
        )

    def mean(self, weights: Tensor) -> Compared:
        """Weighted mean over the first axis; what has no value is left out with its weight, in the
        null too."""
        weights = torch.where(self.value.isnan(), 0.0, weights.double())
        total = weights.sum(0)
        return Compared(
            (weights * self.value.nan_to_num()).sum(0) / total,
            (weights * self.null.nan_to_num()).sum(0) / total,
            (weights * self.spread.nan_to_num()).square().sum(0).sqrt() / total,
            self.count.sum(0),
        )

    def or_else(self, value: float) -> Compared:
        """The same with `value` where masks have none (0 / 0), and in the null there."""
        none = self.value.isnan()
        given, null = (column.masked_fill(none, value) for column in (self.value, self.null))
        return Compared(given, null, self.spread.masked_fill(none, 0.0), self.count)

    def minus(self, other: Compared) -> Compared:
        """Differences from numbers of other, independent masks."""
        spread = torch.hypot(self.spread, other.spread)
        return Compared(self.value - other.value, self.null - other.null, spread, self.count)

    def rows(self, least: float = 0.0, most: float = 1.0) -> list[dict[str, float]]:
        """value, null, low, high and n of each number: low..high is the null's 95 % interval within
        least..most.

        By the normal distribution.
        """
        half = Z_95 * self.spread
        low, high = ((self.null + side * half).clamp(least, most) for side in (-1, 1))
        columns = (
            column.reshape(-1).tolist() for column in (self.value, self.null, low, high, self.count)
        )
        return [
            dict(zip(("value", "null", "low", "high", "n"), row, strict=True))
            for row in zip(*columns, strict=True)
        ]


class Sharing:
    """Sizes, overlaps and unions of K masks of the same weights; a `component` is one of theirs or
    `ALL`.

    Parameters
    ----------
    masks : of the steps, or of parts of the data.

    Attributes
    ----------
    pairs : (i, j), i < j from 0: masks of the same stored block.
    sizes : component -> active weights |M_t| ``(K,)`` float64.
    width : component -> |W|, the weights of a stored block.
    weights : component -> those of all stored blocks.
    """

    def __init__(self, masks: Masks) -> None:
        blocks = sorted({*masks.blocks})
        self._rows = [
            torch.tensor([i for i, block in enumerate(masks.blocks) if block == b]) for b in blocks
        ]
        self.pairs = [
            pair for rows in self._rows for pair in itertools.combinations(rows.tolist(), 2)
        ]
        self.components = tuple(masks)
        self.sizes = {name: masks[name].flatten(1).sum(1).double() for name in masks}
        self.width = {name: masks[name][0].numel() for name in masks}
        self._alone: dict[str, Compared] = {}
        self._overlap: dict[str, Compared] = {}
        self._used: dict[str, Tensor] = {}
        for name in masks:
            self._compare(name, masks[name].flatten(1))
        self.sizes[ALL] = torch.stack([self.sizes[name] for name in masks]).sum(0)
        self.width[ALL] = sum(self.width[name] for name in masks)
        self.weights = {name: len(blocks) * width for name, width in self.width.items()}
        self._used[ALL] = torch.stack([self._used[name] for name in masks]).sum(0)

    def _compare(self, name: str, mask: Tensor) -> None:
        """Measure a component ``(K, W)``, block by block."""
        alone, overlap = (
            torch.zeros(2, len(mask)).double(),
            torch.zeros(2, len(mask), len(mask)).double(),
        )
        used = torch.zeros(2, len(mask) + 1).double()  # masks and null, as everywhere here
        for rows in self._rows:
            own, to = mask[rows], (rows[:, None], rows)
            density = own.double().mean(1)
            alone[0, rows], alone[1, rows] = (
                metrics.specialization(own),
                metrics.independent_specialization(density),
            )
            overlap[0][to], overlap[1][to] = (
                metrics.jaccard(own),
                metrics.independent_jaccard(density),
            )
            used[0, : len(rows) + 1] += metrics.utilisation(own)
            used[1, : len(rows) + 1] += own.shape[1] * metrics.independent_utilisation(density)
        i, j = torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        union = (self.sizes[name][i] + self.sizes[name][j]) / (1 + overlap[0, i, j])
        self._alone[name] = Compared.shares(alone, self.sizes[name])
        self._overlap[name] = Compared.shares(overlap[:, i, j], union)
        self._used[name] = used

    def specialization(self, component: str) -> Compared:
        """S_t ``(K,)``, the share of a mask's weights that no other has; nan of an empty mask (eq.
        12)."""
        if component != ALL:
            return self._alone[component]
        sizes = torch.stack([self.sizes[name] for name in self.components])
        return Compared.stack([self._alone[name] for name in self.components]).mean(sizes)

    def jaccard(self, component: str, empty: float = math.nan) -> Compared:
        """J of all `pairs`, `empty` for two empty masks; of `ALL` the components' mean by size (eq.
        11)."""
        each, sizes = self._overlaps(component, empty)
        return each.mean(sizes)

    def mean_jaccard(self, component: str, empty: float = math.nan) -> Compared:
        """Their mean ``()`` over pairs, and of `ALL` over components by size (Fig. 14F); nan
        without pairs.

        The overlaps of two pairs of independent masks are uncorrelated: variances add up.
        """
        each, sizes = self._overlaps(component, empty)
        return each.each(Tensor.flatten).mean(sizes.flatten())

    def _overlaps(self, component: str, empty: float) -> tuple[Compared, Tensor]:
        """J of every component and pair ``(components, pairs)``, and the components' sizes
        alike."""
        names = self.components if component == ALL else (component,)
        each = Compared.stack([self._overlap[name] for name in names]).or_else(empty)
        return each, torch.tensor([self.width[name] for name in names])[:, None].expand_as(
            each.value
        )

    def utilisation(self, component: str) -> Compared:
        """Share of the union's weights in exactly u = 1..K masks ``(K,)`` (Fig. 5a); nan of an
        empty union."""
        used = self._used[component][:, 1:]
        return Compared.shares(
            used / used.sum(1, keepdim=True), used[0].sum().expand(used.shape[1])
        )

    def sparsity(self, component: str) -> Tensor:
        """Mask-level sparsity ``(K,)``, ``1 - |M_t| / |W|``."""
        return 1 - self.sizes[component] / self.width[component]

    def unused(self, component: str) -> Compared:
        """Weight-level sparsity ``()``: the share of weights in no mask (Table 7)."""
        weights = torch.tensor(self.weights[component]).double()
        return Compared.shares(self._used[component][:, 0] / weights, weights)

    def unused_by_layer(self) -> Compared:
        """Mean of the components' weight-level sparsities ``()``, large and small alike."""
        return Compared.stack([self.unused(name) for name in self.components]).mean(
            torch.ones(len(self.components))
        )

    def least_unused(self, component: str) -> float:
        """The least weight-level sparsity that masks of these sizes can have: when none overlap."""
        names = self.components if component == ALL else (component,)
        union = sum(
            min(float(self.sizes[name][rows].sum()), self.width[name])
            for name in names
            for rows in self._rows
        )
        return 1 - union / self.weights[component]

    def mean_uses(self, component: str) -> Compared:
        """In how many masks an active weight is, on average ``()``, 1..K; nan of an empty union."""
        active, unused = self.sizes[component].sum(), self.unused(component)
        union, expected = ((1 - share) * unused.count for share in (unused.value, unused.null))
        null = active / expected
        return Compared(active / union, null, null * unused.spread / (1 - unused.null), union)
