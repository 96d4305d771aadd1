"""What masks of several steps share, beside what independent masks would.

Section 4.2.3 and Appendix G of bViT (arXiv 2605.10661). The nulls are ours: masks as dense in every
step and layer, each weight drawn independently. Random masks, too, grow more "specialised" as they
become sparser. Steps that apply different stored blocks (those of a hybrid or a stack) share no
weights and are never compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.analyses.pathways import ALL_LAYERS
from bvit_interp.metrics.statistics import Z_95
from bvit_interp.models.masks import Masks


@dataclass(frozen=True)
class Compared:
    """Numbers of the masks, each beside its null; all float64 of one shape.

    Parameters
    ----------
    value : of the masks.
    null : expected for independent masks of the same densities.
    null_std : standard deviation of the null if every weight is drawn independently; masks of fixed
        sizes vary less.
    count : number of weights of which the value is a share.
    """

    value: Float[Tensor, "*shape"]
    null: Float[Tensor, "*shape"]
    null_std: Float[Tensor, "*shape"]
    count: Float[Tensor, "*shape"]

    @classmethod
    def shares(
        cls,
        value: Float[Tensor, "*shape"],
        null: Float[Tensor, "*shape"],
        count: Float[Tensor, "*shape"],
    ) -> Compared:
        """Shares of `count` weights, where each weight has the null's probability."""
        return cls(value, null, (null * (1 - null) / count).sqrt(), count)

    @classmethod
    def stack(cls, parts: Sequence[Compared]) -> Compared:
        """Several of one shape, stacked along a new first axis."""
        return cls(
            *(torch.stack([getattr(part, column.name) for part in parts]) for column in fields(cls))
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Compared:
        """All four columns changed by the same function."""
        return Compared(
            change(self.value), change(self.null), change(self.null_std), change(self.count)
        )

    def mean(self, weights: Float[Tensor, "*shape"]) -> Compared:
        """Weighted mean over the first axis.

        Undefined values (nan) are left out with their weights, in the null too.
        """
        weights = torch.where(self.value.isnan(), 0.0, weights.double())
        total = weights.sum(0)
        return Compared(
            (weights * self.value.nan_to_num()).sum(0) / total,
            (weights * self.null.nan_to_num()).sum(0) / total,
            (weights * self.null_std.nan_to_num()).square().sum(0).sqrt() / total,
            self.count.sum(0),
        )

    def fill_undefined(self, value: float) -> Compared:
        """`value` in place of undefined ones (0 / 0), and in their nulls."""
        undefined = self.value.isnan()
        return Compared(
            self.value.masked_fill(undefined, value),
            self.null.masked_fill(undefined, value),
            self.null_std.masked_fill(undefined, 0.0),
            self.count,
        )

    def minus(self, other: Compared) -> Compared:
        """Differences from the numbers of other, independent masks."""
        return Compared(
            self.value - other.value,
            self.null - other.null,
            torch.hypot(self.null_std, other.null_std),
            self.count,
        )

    def rows(self, least: float = 0.0, most: float = 1.0) -> list[dict[str, float]]:
        """value, null, null_low, null_high and n of each number.

        null_low..null_high is the null's 95 % interval by the normal distribution, within
        least..most.
        """
        half_width = Z_95 * self.null_std
        columns = {
            "value": self.value,
            "null": self.null,
            "null_low": (self.null - half_width).clamp(least, most),
            "null_high": (self.null + half_width).clamp(least, most),
            "n": self.count,
        }
        numbers = [column.reshape(-1).tolist() for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*numbers, strict=True)]


class Sharing:
    """Sizes, overlaps and unions of K masks of the same weights.

    A `layer` is a component of the masks, or `ALL_LAYERS`.

    Parameters
    ----------
    masks : one per step, or one per part of the data.

    Attributes
    ----------
    pairs : (i, j), i < j from 0: masks of the same stored block.
    sizes : layer -> active weights |M_t| ``(K,)`` float64.
    width : layer -> |W|, the weights of one stored block.
    weights : layer -> the weights of all stored blocks.
    """

    def __init__(self, masks: Masks) -> None:
        blocks = sorted({*masks.blocks})
        self._steps_of_blocks = [
            torch.tensor([i for i, block in enumerate(masks.blocks) if block == stored])
            for stored in blocks
        ]
        self.pairs: list[tuple[int, int]] = [
            pair
            for steps in self._steps_of_blocks
            for pair in itertools.combinations(steps.tolist(), 2)
        ]
        self.layers = tuple(masks)
        self.sizes = {name: masks[name].flatten(1).sum(1).double() for name in masks}
        self.width = {name: masks[name][0].numel() for name in masks}
        self._specialization: dict[str, Compared] = {}
        self._overlap: dict[str, Compared] = {}
        # layer -> number of weights in exactly 0..K masks, and the number expected (K + 1,)
        self._used: dict[str, tuple[Tensor, Tensor]] = {}
        for name in masks:
            self._compare(name, masks[name].flatten(1))
        self.sizes[ALL_LAYERS] = torch.stack([self.sizes[name] for name in masks]).sum(0)
        self.width[ALL_LAYERS] = sum(self.width[name] for name in masks)
        self.weights = {name: len(blocks) * width for name, width in self.width.items()}
        used, expected = zip(*(self._used[name] for name in masks), strict=True)
        self._used[ALL_LAYERS] = torch.stack(used).sum(0), torch.stack(expected).sum(0)

    def specialization(self, layer: str) -> Compared:
        """S_t ``(K,)``, the share of a mask's weights that no other mask has (eq. 12); nan for an
        empty mask."""
        if layer != ALL_LAYERS:
            return self._specialization[layer]
        sizes = torch.stack([self.sizes[name] for name in self.layers])
        return Compared.stack([self._specialization[name] for name in self.layers]).mean(sizes)

    def jaccard(self, layer: str, empty: float = math.nan) -> Compared:
        """Overlap of all `pairs` (eq. 11); for all layers, their mean weighted by size.

        Parameters
        ----------
        empty : the overlap of two empty masks.
        """
        overlaps, sizes = self._overlaps(layer, empty)
        return overlaps.mean(sizes)

    def mean_jaccard(self, layer: str, empty: float = math.nan) -> Compared:
        """Mean overlap ``()`` of all pairs, and of all layers by size (Fig. 14F); nan without
        pairs.

        The overlaps of two pairs of independent masks are uncorrelated, so their variances add up.
        """
        overlaps, sizes = self._overlaps(layer, empty)
        return overlaps.map(Tensor.flatten).mean(sizes.flatten())

    def utilisation(self, layer: str) -> Compared:
        """Share of the union's weights in exactly u = 1..K masks ``(K,)`` (Fig. 5a); nan for an
        empty union."""
        used, expected = (counts[1:] for counts in self._used[layer])
        return Compared.shares(
            used / used.sum(), expected / expected.sum(), used.sum().expand(len(used))
        )

    def mask_sparsity(self, layer: str) -> Float[Tensor, " masks"]:
        """``1 - |M_t| / |W|`` of each mask."""
        return 1 - self.sizes[layer] / self.width[layer]

    def weight_sparsity(self, layer: str) -> Compared:
        """The share of weights in no mask ``()`` (Table 7)."""
        weights = torch.tensor(self.weights[layer]).double()
        used, expected = self._used[layer]
        return Compared.shares(used[0] / weights, expected[0] / weights, weights)

    def mean_weight_sparsity(self) -> Compared:
        """Unweighted mean of the layers' weight sparsities ``()``."""
        layers = Compared.stack([self.weight_sparsity(name) for name in self.layers])
        return layers.mean(torch.ones(len(self.layers)))

    def least_weight_sparsity(self, layer: str) -> float:
        """The least weight sparsity that masks of these sizes can have, when none overlap."""
        names = self.layers if layer == ALL_LAYERS else (layer,)
        union = sum(
            min(float(self.sizes[name][steps].sum()), self.width[name])
            for name in names
            for steps in self._steps_of_blocks
        )
        return 1 - union / self.weights[layer]

    def mean_uses(self, layer: str) -> Compared:
        """Mean number of masks that contain an active weight ``()``, 1..K; nan for an empty
        union."""
        active, unused = self.sizes[layer].sum(), self.weight_sparsity(layer)
        union = (1 - unused.value) * unused.count
        expected_union = (1 - unused.null) * unused.count
        null = active / expected_union
        return Compared(active / union, null, null * unused.null_std / (1 - unused.null), union)

    def _compare(self, name: str, masks: Bool[Tensor, "masks weights"]) -> None:
        """Compare the masks of one layer, stored block by stored block."""
        count, weights = masks.shape
        zeros = torch.zeros(count, dtype=torch.float64)
        alone, alone_null = zeros.clone(), zeros.clone()
        overlap, overlap_null = zeros.repeat(count, 1), zeros.repeat(count, 1)
        used, used_null = (torch.zeros(count + 1, dtype=torch.float64) for _ in range(2))
        for steps in self._steps_of_blocks:
            of_block = masks[steps]
            density = of_block.double().mean(1)
            square = steps[:, None], steps
            alone[steps] = metrics.specialization(of_block)
            alone_null[steps] = metrics.independent_specialization(density)
            overlap[square] = metrics.jaccard(of_block)
            overlap_null[square] = metrics.independent_jaccard(density)
            used[: len(steps) + 1] += metrics.utilisation(of_block)
            used_null[: len(steps) + 1] += weights * metrics.independent_utilisation(density)
        i, j = torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        union = (self.sizes[name][i] + self.sizes[name][j]) / (1 + overlap[i, j])
        self._specialization[name] = Compared.shares(alone, alone_null, self.sizes[name])
        self._overlap[name] = Compared.shares(overlap[i, j], overlap_null[i, j], union)
        self._used[name] = used, used_null

    def _overlaps(self, layer: str, empty: float) -> tuple[Compared, Tensor]:
        """Overlap of every layer and pair ``(layers, pairs)``, and the layers' sizes alike."""
        names = self.layers if layer == ALL_LAYERS else (layer,)
        overlaps = Compared.stack([self._overlap[name] for name in names]).fill_undefined(empty)
        sizes = torch.tensor([self.width[name] for name in names], dtype=torch.float64)
        return overlaps, sizes[:, None].expand_as(overlaps.value)
