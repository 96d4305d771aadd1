"""A forward pass one step at a time: bit-equal to the model, also cut, and gone on with from a kept
state."""

from __future__ import annotations

import timm
import torch

from bvit_interp.models.stepping import advance, answer, embed
from bvit_interp.models.unroll import unroll


def walk(view, images, until=None):
    """Every state from step 0 on."""
    states = [embed(view, images)]
    while states[-1].step < (len(view.blocks) if until is None else until):
        states.append(advance(view, states[-1]))
    return states


def test_the_last_answer_is_the_models_own_bit_for_bit(any_model, images):
    view = unroll(any_model)
    with torch.inference_mode():
        states = walk(view, images)
        assert [state.step for state in states] == list(range(len(any_model.blocks) + 1))
        assert torch.equal(answer(view, states[-1]), any_model(images))


def test_every_state_is_the_one_by_hand(tiny_te, images, by_hand):
    with torch.no_grad():
        states = walk(unroll(tiny_te), images)
        block = next(tiny_te.blocks.children())
        sites = by_hand.run(tiny_te, images, [block] * 12, step_embed=tiny_te.blocks.step_embed)
        for state, expected in zip(states, sites, strict=True):
            assert torch.allclose(state.tokens, expected["resid_post"], atol=1e-4)


def test_images_that_leave_do_not_change_the_others(any_model, images):
    view = unroll(any_model)
    with torch.inference_mode():
        alone = answer(view, walk(view, images[1:2])[-1])
        state = embed(view, images)
        for leaving in range(len(view.blocks)):
            if leaving == 2:
                state = state[torch.tensor([1])]
            state = advance(view, state)
        assert torch.allclose(answer(view, state), alone, atol=1e-5)


def test_a_kept_state_goes_on_as_the_run_did(any_model, images):
    view = unroll(any_model)
    with torch.inference_mode():
        states = walk(view, images)
        state = states[1]
        while state.step < len(view.blocks):
            state = advance(view, state)
        assert torch.equal(state.tokens, states[-1].tokens)


def test_steps_beyond_the_trained_ones(tiny, images):
    with torch.inference_mode():
        view = unroll(tiny, steps=20)
        assert torch.equal(answer(view, walk(view, images)[-1]), view(images))


def test_a_timm_model(images):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10
    ).eval()
    with torch.inference_mode():
        assert torch.equal(answer(model, walk(model, images)[-1]), model(images))
