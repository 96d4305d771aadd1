"""Steps one at a time: bit-equal to the model, also from a stored state."""

from __future__ import annotations

import pytest
import timm
import torch
from jaxtyping import TypeCheckError

from bvit_interp.models.stepping import advance, answer, device_of, embed, proceed, states
from bvit_interp.models.unroll import unroll


def walk(view, images):
    """Every state from step 0 on."""
    return list(states(view, images))


def test_the_last_answer_is_the_models_own_bit_for_bit(any_model, images):
    view = unroll(any_model)
    with torch.inference_mode():
        every = walk(view, images)
        assert [state.step for state in every] == list(range(len(any_model.blocks) + 1))
        assert torch.equal(answer(view, every[-1]), any_model(images))


def test_every_state_is_the_one_by_hand(tiny_te, images, by_hand):
    with torch.no_grad():
        every = walk(unroll(tiny_te), images)
        block = next(tiny_te.blocks.children())
        sites = by_hand.run(tiny_te, images, [block] * 12, step_embed=tiny_te.blocks.step_embed)
        for state, expected in zip(every, sites, strict=True):
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
        every = walk(view, images)
        state = every[1]
        while state.step < len(view.blocks):
            state = advance(view, state)
        assert torch.equal(state.tokens, every[-1].tokens)
        assert torch.equal(proceed(view, every[1]).tokens, every[-1].tokens)
        middle = proceed(view, every[1], until=3)
        assert middle.step == 3
        assert torch.equal(middle.tokens, every[3].tokens)


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


def test_states_up_to_a_step(tiny, images):
    with torch.inference_mode():
        view = unroll(tiny)
        some = list(states(view, images, until=2))
        assert [state.step for state in some] == [0, 1, 2]
        assert torch.equal(some[2].tokens, walk(view, images)[2].tokens)


def test_a_state_of_some_images_and_of_copies(tiny_sc, images):
    """Tokens and memory alike."""
    with torch.inference_mode():
        state = walk(unroll(tiny_sc), images)[2]
        part, twice = state[1:3], state.repeated(2)
        assert (part.step, twice.step) == (2, 2)
        assert torch.equal(part.tokens, state.tokens[1:3])
        assert torch.equal(part.memory, state.memory[1:3])
        assert torch.equal(twice.tokens, torch.cat([state.tokens, state.tokens]))
        assert torch.equal(twice.memory, torch.cat([state.memory, state.memory]))


def test_where_the_weights_are(tiny):
    assert device_of(tiny) == torch.device("cpu")
    assert device_of(tiny.to("meta")) == torch.device("meta")


def test_images_without_a_batch_axis_are_refused(tiny, images):
    with pytest.raises(TypeCheckError):
        embed(tiny, images[0])
