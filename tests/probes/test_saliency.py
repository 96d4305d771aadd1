"""Saliency maps against an explicit softmax, a written-out loop, autograd by hand and a sum by
hand."""

from __future__ import annotations

import sys

import jaxtyping
import numpy as np
import pytest
import torch

from bvit_interp.errors import MissingExtra, UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes import saliency
from bvit_interp.probes.probe import Probe

CLOSE = {"rtol": 1e-4, "atol": 5e-5}


def blocks_and_embedding(model):
    return [model.blocks[t] for t in range(len(model.blocks))], getattr(
        model.blocks, "step_embed", None
    )


def patterns_by_hand(by_hand, model, images):
    with torch.no_grad():
        return [
            sites["pattern"]
            for sites in by_hand.run(model, images, *blocks_and_embedding(model))[1:]
        ]


def attributed_by_hand(by_hand, model, images, t, at=None):
    """z_{t-1} (or tokens given instead of it) and the gradient of the predicted logit with respect
    to it."""
    blocks, embedding = blocks_and_embedding(model)
    with torch.no_grad():
        hand = by_hand.run(model, images, blocks, embedding)
        predicted = by_hand.logits(model, hand[-1]["resid_post"]).argmax(-1, keepdim=True)
    tokens = (hand[t - 1]["resid_post"] if at is None else at).clone().requires_grad_()
    run = by_hand.run(model, images, blocks, embedding, states={t - 1: tokens})
    logits = by_hand.logits(model, run[-1]["resid_post"])
    (gradient,) = torch.autograd.grad(logits.gather(1, predicted).sum(), tokens)
    return tokens.detach(), gradient


def test_every_method_has_a_word():
    assert list(saliency.METHODS) == [
        "attention",
        "rollout",
        "gradient-x-activation",
        "integrated-gradients",
    ]


# ---- attention -----------------------------------------------------------------------------------


def test_attention_is_the_softmax_of_the_cls_row(any_model, images):
    probe = Probe(any_model)
    maps = saliency.attention(probe, images)
    prefix = any_model.num_prefix_tokens
    assert maps.shape == (4, probe.num_steps, 4, 16)
    with torch.no_grad():
        cache = probe.record(images, ["q", "k"])
    for t in range(1, probe.num_steps + 1):
        for head in range(4):
            q, k = cache["q", t][:, 0, head], cache["k", t][:, :, head]
            row = (k @ q[:, :, None])[..., 0] / q.shape[-1] ** 0.5
            # over all tokens, CLS and registers too
            expected = row.exp() / row.exp().sum(-1, keepdim=True)
            assert (maps[:, t - 1, head] - expected[:, prefix:]).abs().max() < 1e-5


def test_attention_is_that_of_the_loop_by_hand(any_model, images, by_hand):
    maps = saliency.attention(Probe(any_model), images)
    for t, pattern in enumerate(patterns_by_hand(by_hand, any_model, images)):
        torch.testing.assert_close(
            maps[:, t], pattern[:, :, 0, any_model.num_prefix_tokens :], **CLOSE
        )
    assert (maps.sum(-1) < 1).all()  # what CLS and the registers take is not given to the patches


# ---- rollout -------------------------------------------------------------------------------------


def test_rollout_is_the_product_written_out(any_model, images, by_hand):
    maps = saliency.rollout(Probe(any_model), images)
    patterns = [
        pattern.double().numpy() for pattern in patterns_by_hand(by_hand, any_model, images)
    ]
    count, prefix = patterns[0].shape[-1], any_model.num_prefix_tokens
    assert maps.shape == (4, len(patterns), 1, 16)
    for b in range(4):
        mixed = np.eye(count)
        for t, pattern in enumerate(patterns):
            mixed = (0.5 * sum(pattern[b]) / 4 + 0.5 * np.eye(count)) @ mixed
            np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-5)
            np.testing.assert_allclose(maps[b, t, 0], mixed[0, prefix:], rtol=1e-3, atol=2e-5)


def test_first_rollout_is_half_the_mean_attention(tiny_reg4, images):
    probe = Probe(tiny_reg4)
    expected = 0.5 * saliency.attention(probe, images)[:, 0].mean(1)
    torch.testing.assert_close(saliency.rollout(probe, images)[:, 0, 0], expected, **CLOSE)


# ---- attribution ---------------------------------------------------------------------------------


def test_gradient_times_activation(any_model, images, by_hand):
    any_model, images = any_model.double(), images.double()
    probe = Probe(any_model)
    maps = saliency.gradient_x_activation(probe, images)
    assert maps.shape == (4, probe.num_steps, 1, 16)
    assert not maps.requires_grad
    for t in range(1, probe.num_steps + 1):
        tokens, gradient = attributed_by_hand(by_hand, any_model, images, t)
        expected = (tokens * gradient).sum(-1)[:, any_model.num_prefix_tokens :]
        torch.testing.assert_close(maps[:, t - 1, 0], expected, rtol=1e-6, atol=1e-12)
        assert t == probe.num_steps or expected.abs().max() > 1e-6  # not equal by being zero


def test_gradient_times_activation_vanishes_at_the_last_step(any_model, images):
    """There a patch acts through a norm alone, which ignores its length: x . df/dx = 0 (Euler), but
    for eps.

    Not where something else is added to the patch before the norm: a memory that is not the state
    itself.
    """
    maps = saliency.gradient_x_activation(Probe(any_model.double()), images.double())
    memory = getattr(any_model.blocks[0], "memory", None)
    # refreshed at the last of its 5 steps
    through_a_norm_alone = memory is None or memory.kind == "state"
    assert (maps[:, -1].abs().max() < 1e-5 * maps.abs().max()) == through_a_norm_alone


def test_rounding_errors_are_no_map(tiny, images):
    """In float32 too, where the sums at the last step are of about 1e-8: every patch is tied."""
    maps = saliency.gradient_x_activation(Probe(tiny), images)
    assert (maps[:, -1] == 0).all()
    assert (maps[:, :-1] != 0).all()


@pytest.mark.parametrize("t", [1, 3, -1])
def test_integrated_gradients_is_a_gauss_legendre_sum(any_model, images, by_hand, t):
    any_model, images = any_model.double(), images[:2].double()
    probe = Probe(any_model)
    t = probe.num_steps + 1 + t if t < 0 else t
    maps = saliency.integrated_gradients(probe, images)
    assert maps.shape == (2, probe.num_steps, 1, 16)
    assert not maps.requires_grad
    with torch.no_grad():
        runs = [
            by_hand.run(any_model, x, *blocks_and_embedding(any_model))
            for x in (images, torch.zeros_like(images))
        ]
    here, start = (run[t - 1]["resid_post"] for run in runs)
    nodes, weights = np.polynomial.legendre.leggauss(saliency.INTEGRATION_STEPS)
    mean = torch.zeros_like(here)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):  # from -1..1 to 0..1
        mean += (
            weight
            * attributed_by_hand(by_hand, any_model, images, t, start + node * (here - start))[1]
        )
    expected = ((here - start) * mean).sum(-1)[:, any_model.num_prefix_tokens :]
    torch.testing.assert_close(maps[:, t - 1, 0], expected, rtol=1e-6, atol=1e-10)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("steps", [16, 128])
def test_integrated_gradients_are_complete_at_the_embedding(make, images, monkeypatch, steps):
    """What enters step 1 differs from the baseline in the patches only, so they share f(x) -
    f(0)."""
    model = make(name="bvit_small_reg4_patch16_224", num_steps=3)
    monkeypatch.setattr(saliency, "INTEGRATION_STEPS", steps)
    shared = saliency.integrated_gradients(Probe(model), images)[:, 0, 0].sum(-1)
    with torch.no_grad():
        logits, baseline = model(images), model(torch.zeros_like(images))
    expected = (logits - baseline).gather(1, logits.argmax(-1, keepdim=True))[:, 0]
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(shared, expected, rtol=0, atol=0.02 if steps == 16 else 1e-3)


@pytest.mark.parametrize("method", ["gradient-x-activation", "integrated-gradients"])
def test_more_steps_than_the_model_takes(make, images, method):
    probe = Probe(unroll(make(num_steps=2), steps=3))
    whole = saliency.METHODS[method](probe, images)
    # equal weights by the same seed
    longer = saliency.METHODS[method](Probe(make(num_steps=3)), images)
    assert whole.shape == (4, 3, 1, 16)
    torch.testing.assert_close(whole, longer)


# ---- nothing is left -----------------------------------------------------------------------------


@pytest.fixture
def short(make):
    """Three steps with a time embedding: twelve are no more to the point."""
    return make(name="bvit_small_te_patch16_224", num_steps=3)


@pytest.mark.parametrize("method", list(saliency.METHODS))
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_and_the_images_are_left_as_they_came(
    short, images, watched_models, method, frozen
):
    short.requires_grad_(not frozen)
    probe = Probe(short)
    watched_models.append(probe.model)
    plain = short(images).detach()
    before, pixels = saliency.METHODS[method](probe, images), images.clone()
    assert all(parameter.grad is None for parameter in short.parameters())
    assert all(parameter.requires_grad is not frozen for parameter in short.parameters())
    assert images.grad is None and not images.requires_grad
    assert torch.equal(images, pixels)
    assert torch.equal(short(images), plain)
    assert torch.equal(saliency.METHODS[method](probe, images), before)


@pytest.mark.parametrize("method", list(saliency.METHODS))
def test_an_image_has_the_map_it_has_alone(short, images, method):
    probe = Probe(short)
    together = saliency.METHODS[method](probe, images)
    alone = torch.cat([saliency.METHODS[method](probe, image[None]) for image in images])
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize("method", list(saliency.METHODS))
def test_maps_are_made_where_gradients_are_off(short, images, method):
    probe = Probe(short)
    expected = saliency.METHODS[method](probe, images)
    with torch.no_grad():
        assert torch.equal(saliency.METHODS[method](probe, images), expected)


@pytest.mark.parametrize("method", ["gradient-x-activation", "integrated-gradients"])
def test_without_captum_the_extra_is_named(tiny, images, monkeypatch, method):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(
        MissingExtra, match=r"captum is not installed: pip install 'bvit-interp\[attribution\]'"
    ):
        saliency.METHODS[method](Probe(tiny), images)
    assert issubclass(MissingExtra, UserError)


def test_attention_needs_no_captum(tiny, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    assert saliency.attention(Probe(tiny), images).shape == (4, 12, 4, 16)
    assert saliency.rollout(Probe(tiny), images).shape == (4, 12, 1, 16)


@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_a_model_without_cls_has_no_cls_row(make, images, method):
    probe = Probe(make(name="vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg"))
    with pytest.raises(UserError, match="this model has no CLS token"):
        saliency.METHODS[method](probe, images)


def test_wrong_shapes_are_refused(tiny, images):
    with pytest.raises(jaxtyping.TypeCheckError):
        saliency.attention(Probe(tiny), images[0])
    with pytest.raises(jaxtyping.TypeCheckError):
        saliency.rollout_step(torch.rand(2, 4, 17, 17), torch.rand(2, 16, 16))
