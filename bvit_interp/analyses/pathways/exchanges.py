"""A masked model that answers with the masks of its steps exchanged: does a pathway belong to its
step?

Ours, not the paper's. Step t's masked weights ``W * M_s`` are those of step s, so that none is
computed anew; norms, biases and a time embedding stay the step's own. A run starts from the state
before the first step that is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bvit_interp.models.masks import PLACES, Masks
from bvit_interp.models.stepping import advance, answer, embed, proceed
from bvit_interp.models.unroll import unroll


class Exchanges:
    """The model with its own masks, and with those of other steps of the same stored block.

    Parameters
    ----------
    model : made by `models.masks.masked`; it is not changed, nor its weights.
    masks : its masks.
    swaps : whether every step is run on every other step's masks, the rest on their own.
    shuffles : how many random orders of the masks over the steps are run, none of them their own.
    seed : of the orders.

    Attributes
    ----------
    swaps : (t, s) from 0: step t on the masks of step s.
    orders : per order the step whose masks step t = 0..T-1 runs on; none where no two steps share a
        block.
    """

    def __init__(
        self,
        model: VisionTransformer,
        masks: Masks,
        swaps: bool = False,
        shuffles: int = 0,
        seed: int = 0,
    ) -> None:
        self.view = unroll(model)
        self.device = next(model.parameters()).device
        parts = [
            (block, *getattr(block, "inner", ())) for block in self.view.blocks
        ]  # a memory's updates are the step's
        self._linears = [[_plain(part) for part in of_step] for of_step in parts]
        self._weights = [[linear.weight for linear in of_step[0]] for of_step in self._linears]
        of_block = {
            b: [t for t, block in enumerate(masks.blocks) if block == b] for b in masks.blocks
        }
        self.swaps = (
            [(t, s) for t, b in enumerate(masks.blocks) for s in of_block[b] if s != t]
            if swaps
            else []
        )
        self.orders: list[list[int]] = []
        rng, own = np.random.default_rng(seed), list(range(masks.count))
        while len(self.orders) < shuffles and len(of_block) < masks.count:
            drawn = {b: iter(rng.permutation(steps).tolist()) for b, steps in of_block.items()}
            order = [next(drawn[b]) for b in masks.blocks]
            self.orders += [order] if order != own else []

    def logits(self, images: Tensor) -> Iterator[Tensor]:
        """Logits ``(B, C)`` of normalised images: with its own masks, then of every swap, then of
        every order."""
        states = [embed(self.view, images.to(self.device))]
        for _ in self.view.blocks:
            states.append(advance(self.view, states[-1]))
        yield answer(self.view, states[-1])
        for change in [{t: s} for t, s in self.swaps] + [
            dict(enumerate(order)) for order in self.orders
        ]:
            state = states[min(change)]
            with self._placed(change):
                logits = answer(self.view, proceed(self.view, state))
            yield logits

    @contextmanager
    def _placed(self, change: Mapping[int, int]) -> Iterator[None]:
        """The masked weights of step s at step t, for every t -> s (from 0), while the context
        lasts."""
        try:
            for t, s in change.items():
                self._set(t, s)
            yield
        finally:
            for t in change:
                self._set(t, t)

    def _set(self, t: int, s: int) -> None:
        for of_part in self._linears[t]:
            for linear, weight in zip(of_part, self._weights[s], strict=True):
                linear.weight = weight


def _plain(block: nn.Module) -> list[nn.Linear]:
    """The masked layers of a block, made ordinary ones: a masked weight may be computed at every
    access."""
    found = []
    for place in PLACES.values():
        old: Any = block.get_submodule(place)
        new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
        new.weight, new.bias = nn.Parameter(old.weight.detach(), requires_grad=False), old.bias
        block.set_submodule(place, new)
        found.append(new)
    return found
