"""Patched cells against forwards written by hand, one cell at a time."""

from __future__ import annotations

import pytest
import torch
from foreign import STEPS, answer_by_hand, foreign, states_by_hand
from jaxtyping import TypeCheckError

from bvit_interp.analyses.patching.patches import StepPatcher
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe


@pytest.fixture
def others():
    """Four other images."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(8))


def blocks_of(model):
    return [model.blocks[i] for i in range(len(model.blocks))]


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_states_against_the_forward_written_by_hand(any_model, images, others, by_hand, tokens):
    """Also with a memory, which stays the receiver's, with a time embedding, registers and several
    blocks."""
    blocks, embed = blocks_of(any_model), getattr(any_model.blocks, "step_embed", None)
    last = len(blocks)
    patches = StepPatcher(any_model, tokens=tokens, steps=(1, 2, last))
    prefix = any_model.num_prefix_tokens
    rows = {"all": slice(None), "cls": slice(0, 1), "patches": slice(prefix, None)}[tokens]
    with torch.inference_mode():
        logits = patches.logits(images, others)
        donor, receiver = (by_hand.run(any_model, x, blocks, embed) for x in (others, images))
        for i, s in enumerate(patches.steps):
            for j, t in enumerate(patches.steps):
                state = receiver[t]["resid_post"].clone()
                state[:, rows] = donor[s]["resid_post"][:, rows]
                if t < last:
                    state = by_hand.run(any_model, images, blocks, embed, states={t: state})[-1][
                        "resid_post"
                    ]
                torch.testing.assert_close(
                    logits[i, j], by_hand.logits(any_model, state), rtol=1e-4, atol=1e-4
                )
    assert logits.shape == (3, 3, 4, 10)
    assert (logits[0, 1] - logits[1, 1]).abs().max() > 1e-3


def test_neurons_against_the_forward_written_by_hand(tiny, images, others, by_hand):
    patches = StepPatcher(tiny, "mlp_post", "cls", unit=5, steps=(2, 12))
    blocks = [tiny.blocks[0]] * 12
    with torch.inference_mode():
        logits = patches.logits(images, others)
        donor = by_hand.run(tiny, others, blocks)
        for i, s in enumerate((2, 12)):
            for j, t in enumerate((2, 12)):

                def change(neurons, s=s):
                    neurons = neurons.clone()
                    neurons[:, 0, 5] = donor[s]["mlp_post"][:, 0, 5]
                    return neurons

                state = by_hand.run(tiny, images, blocks, changes={t: change})[-1]["resid_post"]
                torch.testing.assert_close(
                    logits[i, j], by_hand.logits(tiny, state), rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize(
    ("site", "unit", "index"),
    [
        ("z", 1, lambda rows: (slice(None), rows, 1)),
        ("attn_out", None, lambda rows: (slice(None), rows)),
        ("resid_mid", 3, lambda rows: (slice(None), rows, 3)),
        ("resid_post", 3, lambda rows: (slice(None), rows, 3)),
        ("pattern", None, lambda rows: (slice(None), slice(None), rows)),
        ("pattern", 2, lambda rows: (slice(None), 2, rows)),
    ],
)
def test_other_sites_against_one_edit_at_a_time(stacked, images, others, site, unit, index):
    patches, probe = StepPatcher(stacked, site, "patches", unit), Probe(stacked)
    where = index(slice(1, None))
    with torch.inference_mode():
        logits, cache = patches.logits(images, others), probe.record(others, site)
        for s in (1, 2, 3):
            for t in (1, 2, 3):

                def edit(old, _, s=s):
                    new = old.clone()
                    new[where] = cache[site, s][where]
                    return new

                with probe.edit({(site, t): edit}):
                    torch.testing.assert_close(
                        logits[s - 1, t - 1], probe(images), rtol=1e-5, atol=1e-5
                    )


@pytest.mark.parametrize("kind", ["encoder", "prelude", "two_state", "looped_timm", "dinov3"])
@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_models_that_are_not_ours_by_hand(kind, tokens, images, others):
    """What a step reads besides the state stays the receiver's: injected input, earlier states."""
    model = foreign(kind)
    patches = StepPatcher(model, tokens=tokens)
    assert patches.steps == list(range(1, STEPS[kind] + 1))
    assert not patches.whole and not patches.tied
    rows = slice(0 if tokens == "all" else patches.probe.num_prefix_tokens, None)
    with torch.inference_mode():
        logits = patches.logits(images, others)
        donor, receiver = (states_by_hand(model, x) for x in (others, images))
        for s in patches.steps:
            for t in patches.steps:
                state = receiver[t].clone()
                state[:, rows] = donor[s][:, rows]
                run = states_by_hand(model, images, put={t: state})
                expected = answer_by_hand(model, run[-1])
                torch.testing.assert_close(logits[s - 1, t - 1], expected, rtol=1e-4, atol=1e-4)
    assert (logits[0, 1] - logits[1, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["encoder", "prelude", "two_state", "dinov3"])
def test_heads_of_models_that_are_not_ours_against_one_edit_at_a_time(kind, images, others):
    """A run from the state before the step, against whole runs."""
    patches = StepPatcher(foreign(kind), "z", unit=1, steps=(1, 3))
    probe = patches.probe
    with torch.inference_mode():
        logits, cache = patches.logits(images, others), probe.record(others, "z")
        for i, s in enumerate((1, 3)):
            for j, t in enumerate((1, 3)):
                with probe.edit({("z", t, 1): lambda _, __, s=s: cache["z", s][:, :, 1]}):
                    expected = probe(images)
                torch.testing.assert_close(logits[i, j], expected, rtol=1e-4, atol=1e-4)
    assert (logits[0, 1] - logits[1, 1]).abs().max() > 1e-5


def test_one_map_needs_one_longer_run(tiny, images, others):
    """F^(T-t)(z_s), by models of so many steps; and the same by restarts, in the unroll, which is
    not known as tied."""
    patches, restarts = StepPatcher(tiny, steps=(1, 12)), StepPatcher(unroll(tiny), steps=(1, 12))
    assert patches.tied and not restarts.tied
    with torch.inference_mode():
        logits = patches.logits(images, others)
        torch.testing.assert_close(logits, restarts.logits(images, others), rtol=1e-5, atol=1e-5)
        for i, s in enumerate((1, 12)):
            for j, t in enumerate((1, 12)):
                torch.testing.assert_close(
                    logits[i, j], unroll(tiny, steps=s + 12 - t)(others), rtol=1e-5, atol=1e-5
                )


def test_what_is_whole_and_what_is_one_map(tiny, tiny_te, tiny_hybrid, tiny_fl, stacked):
    known = {
        model: (patches.whole, patches.tied)
        for model in (tiny, tiny_te, tiny_hybrid, tiny_fl, stacked)
        for patches in [StepPatcher(model)]
    }
    assert known == {
        tiny: (True, True),
        tiny_te: (True, False),
        tiny_hybrid: (True, False),
        tiny_fl: (False, False),
        stacked: (True, False),
    }
    for options in ({"tokens": "cls"}, {"unit": 2}, {"site": "attn_out"}):
        assert not StepPatcher(tiny, **options).whole


@pytest.mark.parametrize(
    ("site", "tokens", "patched"), [("resid_post", "cls", 792), ("z", "all", 936)]
)
def test_blocks_applied_are_those_of_the_docstring(tiny, images, site, tokens, patched):
    patches, calls = StepPatcher(tiny, site, tokens), []
    handles = [
        b.register_forward_pre_hook(lambda _, x: calls.append(len(x[0])))
        for b in patches.view.blocks
    ]
    with torch.inference_mode():
        patches.logits(images, images)
    for handle in handles:
        handle.remove()
    assert sum(calls) == 4 * (patched + 24)  # 24: the runs of donor and receiver


def test_one_map_applies_its_block_23_times(tiny, images):
    patches, calls = StepPatcher(tiny), []
    handles = [b.register_forward_hook(lambda *_: calls.append(1)) for b in patches._longer.blocks]
    with torch.inference_mode():
        patches.logits(images, images)
    for handle in handles:
        handle.remove()
    assert len(calls) == 23


def test_nothing_stays_on_the_model(tiny, images, watched_models):
    patches = StepPatcher(tiny, "z", "cls", steps=(1, 2))
    watched_models.append(patches.view)
    before = tiny(images)
    patches.logits(images, images.flip(0))
    assert torch.equal(tiny(images), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "residual"}, "unknown site 'residual'"),
        ({"site": "z", "unit": 4}, "no head 4; heads: 0..3"),
        ({"tokens": "reg"}, "selects none of the 17 tokens"),
        ({"steps": (1, 13)}, "no step 13; steps: 1..12"),
        ({"site": "inner1.z"}, "this model has none"),
    ],
)
def test_what_the_model_does_not_have_is_refused(tiny, options, message):
    with pytest.raises(UserError, match=message):
        StepPatcher(tiny, **options)


def test_wrong_shapes_are_refused(tiny, images):
    patcher = StepPatcher(tiny, steps=(1, 2), tokens="cls")
    with pytest.raises(TypeCheckError):
        patcher.logits(images, images[:2])
    with pytest.raises(TypeCheckError):
        patcher.activations(images[0])
