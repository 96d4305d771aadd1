"""A masked model run with the masks of its steps exchanged.

Ours, not the paper's: does a pathway belong to its step? At a step that is changed, the masked
weights ``W * M_s`` of another step s are used, so no weight is computed anew. Norms, biases and a
time embedding stay the step's own. A run starts from the state before the first step that is
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from bvit_interp.models.looped import Model
from bvit_interp.models.masks import PLACES, Masks
from bvit_interp.models.stepping import answer, proceed, states
from bvit_interp.models.unroll import unroll


class Exchanges:
    """A model with its own masks, and with those of other steps of the same stored block.

    Parameters
    ----------
    model : made by `models.masks.masked`; neither it nor its weights are changed.
    masks : its masks.
    swaps : run every step on every other step's masks, while the other steps keep their own.
    shuffles : number of random orders of the masks over the steps to run, none of them the model's
        own.
    seed : random seed for the orders.

    Attributes
    ----------
    swaps : (t, s) from 0: step t runs on the masks of step s.
    orders : per order, the step whose masks step t = 0..T-1 runs on; empty where no two steps share
        a block.
    """

    def __init__(
        self,
        model: Model,
        masks: Masks,
        swaps: bool = False,
        shuffles: int = 0,
        seed: int = 0,
    ) -> None:
        self.unrolled = unroll(model)
        # inner updates of a memory belong to their step
        self._linears = [
            [_unmasked_linears(part) for part in (block, *getattr(block, "inner", ()))]
            for block in self.unrolled.blocks
        ]
        self._weights = [[linear.weight for linear in parts[0]] for parts in self._linears]
        steps_of_block = {
            block: [step for step, stored in enumerate(masks.blocks) if stored == block]
            for block in masks.blocks
        }
        self.swaps: list[tuple[int, int]] = []
        if swaps:
            self.swaps = [
                (step, other)
                for step, block in enumerate(masks.blocks)
                for other in steps_of_block[block]
                if other != step
            ]
        self.orders: list[list[int]] = []
        rng, identity = np.random.default_rng(seed), list(range(masks.count))
        while len(self.orders) < shuffles and len(steps_of_block) < masks.count:
            drawn = {
                block: iter(rng.permutation(steps).tolist())
                for block, steps in steps_of_block.items()
            }
            order = [next(drawn[block]) for block in masks.blocks]
            if order != identity:
                self.orders.append(order)

    def logits(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Iterator[Float[Tensor, "batch classes"]]:
        """Logits with the model's own masks, then of every swap, then of every order.

        Parameters
        ----------
        images : normalised, on the model's device.
        """
        own = list(states(self.unrolled, images))
        yield answer(self.unrolled, own[-1])
        changes = [{step: other} for step, other in self.swaps]
        changes += [dict(enumerate(order)) for order in self.orders]
        for change in changes:
            with self._exchanged(change):
                logits = answer(self.unrolled, proceed(self.unrolled, own[min(change)]))
            yield logits

    @contextmanager
    def _exchanged(self, change: Mapping[int, int]) -> Iterator[None]:
        """Each step of the keys (from 0) has the masked weights of its value's step, while the
        context lasts."""
        try:
            for step, other in change.items():
                self._set_weights(step, other)
            yield
        finally:
            for step in change:
                self._set_weights(step, step)

    def _set_weights(self, step: int, other: int) -> None:
        for linears in self._linears[step]:
            for linear, weight in zip(linears, self._weights[other], strict=True):
                linear.weight = weight


def _unmasked_linears(block: nn.Module) -> list[nn.Linear]:
    """The masked layers of a block, replaced by ordinary ones that hold ``W * M``.

    A masked weight may be computed at every access; these are computed once.
    """
    linears = []
    for module in PLACES.values():
        masked: Any = block.get_submodule(module)
        linear = nn.Linear(masked.in_features, masked.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(masked.weight.detach(), requires_grad=False)
        linear.bias = masked.bias
        block.set_submodule(module, linear)
        linears.append(linear)
    return linears
