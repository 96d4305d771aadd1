"""Exchanged masks against models made with those masks, run from the first step on."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.pathways.exchanges import Exchanges
from bvit_interp.models.masks import Masks, full, masked
from bvit_interp.models.unroll import unroll


def thinned(model, density=0.5, seed=0):
    every, generator = full(model), torch.Generator().manual_seed(seed)
    thin = {
        name: torch.rand(mask.shape, generator=generator) < density for name, mask in every.items()
    }
    return Masks(thin, every.blocks)


def test_restarting_from_the_changed_step_is_a_full_run_with_the_exchanged_masks(any_model, images):
    """Every swap and order is run, one in eleven compared."""
    masks = thinned(any_model)
    view = masked(any_model, masks, baked=True)
    before = {name: tensor.clone() for name, tensor in view.state_dict().items()}
    exchanges = Exchanges(view, masks, swaps=True, shuffles=3)
    with torch.inference_mode():
        own, *others = exchanges.logits(images)
        assert torch.equal(own, view(images))
        assert torch.equal(own, exchanges.unrolled(images))  # the weights are back at their steps
    steps = list(range(masks.count))
    orders = [
        [s if t == changed else t for t in steps] for changed, s in exchanges.swaps
    ] + exchanges.orders
    assert len(others) == len(orders)
    for logits, order in list(zip(others, orders, strict=True))[::-11]:
        exchanged = Masks({name: mask[order] for name, mask in masks.items()}, masks.blocks)
        with torch.inference_mode():
            torch.testing.assert_close(logits, masked(any_model, exchanged, baked=True)(images))
            assert not torch.equal(logits, own)
    assert all(torch.equal(tensor, before[name]) for name, tensor in view.state_dict().items())


def test_masks_that_are_multiplied_in_every_forward_exchange_alike(tiny, images):
    masks = thinned(tiny)
    with torch.inference_mode():
        baked, live = (
            torch.stack(
                [*Exchanges(masked(tiny, masks, baked=b), masks, shuffles=2).logits(images)]
            )
            for b in (True, False)
        )
    assert torch.equal(baked, live)


def test_which_exchanges(tiny, tiny_hybrid, stacked):
    found = Exchanges(
        masked(tiny, thinned(tiny), baked=True), thinned(tiny), swaps=True, shuffles=40, seed=1
    )
    assert len(found.swaps) == len({*found.swaps}) == 132
    assert all(
        sorted(order) == list(range(12)) and order != list(range(12)) for order in found.orders
    )
    again = Exchanges(masked(tiny, thinned(tiny), baked=True), thinned(tiny), shuffles=40, seed=1)
    assert again.orders == found.orders
    assert again.swaps == []
    masks = thinned(tiny_hybrid)
    found = Exchanges(masked(tiny_hybrid, masks, baked=True), masks, swaps=True, shuffles=9)
    assert len(found.swaps) == 2 * 6  # two blocks, each with three of the six steps
    assert all(masks.blocks[s] == masks.blocks[t] for t, s in found.swaps)
    assert all(s % 2 == t % 2 for order in found.orders for t, s in enumerate(order))
    masks = thinned(stacked)
    found = Exchanges(masked(stacked, masks, baked=True), masks, swaps=True, shuffles=2)
    assert found.swaps == found.orders == []


def test_equal_masks_make_no_difference_and_steps_keep_their_embedding(tiny_te, images):
    one = thinned(tiny_te)
    masks = Masks({name: mask[:1].expand(12, -1, -1).clone() for name, mask in one.items()})
    exchanges = Exchanges(masked(tiny_te, masks, baked=True), masks, swaps=True, shuffles=2)
    with torch.inference_mode():
        own, *others = exchanges.logits(images)
    assert all(torch.equal(own, other) for other in others)


def test_an_error_leaves_every_weight_at_its_step(tiny, images, monkeypatch):
    masks = thinned(tiny)
    exchanges = Exchanges(masked(tiny, masks, baked=True), masks, swaps=True)
    with torch.inference_mode():
        own = next(exchanges.logits(images))
        runs = exchanges.logits(images)
        next(runs)
        monkeypatch.setattr(type(tiny), "forward_head", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(runs)
        monkeypatch.undo()
        assert torch.equal(own, exchanges.unrolled(images))
    assert len(unroll(exchanges.unrolled).blocks) == 12


def test_wrong_shapes_are_refused(tiny):
    masks = thinned(tiny)
    exchanges = Exchanges(masked(tiny, masks, baked=True), masks)
    with pytest.raises(TypeCheckError):
        next(exchanges.logits(torch.zeros(3, 32, 32)))
