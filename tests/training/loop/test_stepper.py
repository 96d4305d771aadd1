"""One optimiser step: parts, clipping, shared gradients, random numbers."""

from __future__ import annotations

import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.layers import PatchDropout
from torch import nn

from bvit_interp.training.loop.stepper import NoisePatchDropout, Stepper


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 4, 4, generator=generator), torch.arange(8) % 5


def model_of(dropout=0.0):
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 5)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.fixture
def stepper(recipe):
    """``stepper(model, rate=0.5, no_sync=..., **recipe)``: a step of plain gradient descent."""

    def make(model, rate=0.5, **settings):
        about = {"no_sync": settings.pop("no_sync")} if "no_sync" in settings else {}
        loss = lambda images, targets: nn.functional.cross_entropy(model(images), targets)  # noqa: E731
        return Stepper(
            recipe(**settings), model, torch.optim.SGD(model.parameters(), lr=rate), loss, **about
        )

    return make


def by_hand(model, batch):
    """Mean loss of the batch, and its gradient."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    gradient = torch.cat(
        [part.flatten() for part in torch.autograd.grad(loss, [*model.parameters()])]
    )
    return loss.item(), gradient


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_a_step_in_parts_is_that_of_the_batch(stepper, batch, accumulate):
    model = model_of()
    before, (loss, gradient) = weights_of(model), by_hand(model, batch)
    found, norm = stepper(model, clip=None, accumulate=accumulate)(*batch, 0, 0)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert not found.requires_grad and not norm.requires_grad
    torch.testing.assert_close(weights_of(model), before - 0.5 * gradient, atol=1e-6, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_soft_targets_are_divided_into_parts_too(stepper, batch):
    models = [model_of() for _ in range(2)]
    soft = torch.rand(8, 5, generator=torch.Generator().manual_seed(3)).softmax(1)
    for model, accumulate in zip(models, (1, 4), strict=True):
        stepper(model, accumulate=accumulate)(batch[0], soft, 0)
    torch.testing.assert_close(weights_of(models[0]), weights_of(models[1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_clipping_shortens_the_step_and_tells_the_norm_before(stepper, batch, accumulate):
    model = model_of()
    before, (_, gradient) = weights_of(model), by_hand(model, batch)
    assert gradient.norm() > 0.05
    _, norm = stepper(model, clip=0.05, accumulate=accumulate)(*batch, 0)
    assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-5)
    moved = weights_of(model) - before
    torch.testing.assert_close(moved, -0.5 * 0.05 * gradient / gradient.norm(), atol=1e-6, rtol=0)
    model, free = model_of(), model_of()
    stepper(model, clip=1e6)(*batch, 0)
    stepper(free, clip=None)(*batch, 0)
    torch.testing.assert_close(weights_of(model), weights_of(free), atol=1e-7, rtol=0)


def test_a_gradient_that_is_not_finite_is_told_and_not_raised(stepper, batch):
    _, norm = stepper(model_of(), clip=1.0)(batch[0] * torch.nan, batch[1], 0)
    assert not norm.isfinite()


def test_gradients_are_shared_in_the_last_part_alone(stepper, batch):
    entered, model = [], model_of()

    @contextmanager
    def no_sync():
        entered.append("in")
        yield
        entered.append("out")

    model.register_forward_pre_hook(lambda *_: entered.append("forward"))
    model.register_full_backward_hook(lambda *_: entered.append("backward"))
    stepper(model, accumulate=3, batch_size=9, no_sync=no_sync)(
        torch.randn(9, 3, 4, 4, requires_grad=True), torch.zeros(9).long(), 0
    )
    part = ["forward", "backward"]
    assert entered == ["in", *part, "out", "in", *part, "out", *part]


def test_what_the_model_draws_is_of_the_numbers_alone_and_leaves_no_trace(stepper, batch):
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    found = []
    for drawn in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (2, 2, 3)):
        model = model_of(dropout=0.5).train()
        step, before = stepper(model), states()  # other ones each time: making a model draws
        step(*batch, *drawn)
        assert states() == before
        found.append(weights_of(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_parts_of_a_batch_do_not_draw_the_same(stepper):
    seen, model = [], model_of(dropout=0.5).train()
    model[3].register_forward_hook(lambda module, given, output: seen.append(output.detach() == 0))
    stepper(model, accumulate=2)(torch.ones(8, 3, 4, 4), torch.zeros(8).long(), 0)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])


def test_forgetting_changes_nothing_where_nothing_is_captured(stepper, batch):
    models = [model_of(), model_of()]
    steps = [stepper(model) for model in models]
    for i in range(6):
        for step in steps:
            step(*batch, i)
        steps[1].reset()
    assert torch.equal(weights_of(models[0]), weights_of(models[1]))


# ---- patches left out by noise that is given

TOKENS = torch.arange(8 * 17 * 2.0).view(8, 17, 2)


def noise_of(*numbers):
    module = NoisePatchDropout(PatchDropout(0.25), 16).train()
    given = []

    def loss(images, targets):
        given.append(module(TOKENS[: len(images)]))
        return images.sum() * weight.sum()

    weight = nn.Parameter(torch.ones(1))
    recipe = SimpleNamespace(accumulate=2, clip=None)
    holder = nn.ParameterList([weight])
    step = Stepper(recipe, holder, torch.optim.SGD([weight], lr=0.1), loss, dropouts=[module])
    for drawn in numbers:
        step(torch.ones(4, 3, 2, 2), torch.zeros(4), *drawn)
    return module, given


@pytest.mark.parametrize("ordered", [False, True])
def test_it_leaves_out_what_timms_does_on_that_noise(monkeypatch, ordered):
    theirs = PatchDropout(0.3, num_prefix_tokens=1, ordered=ordered).train()
    ours = NoisePatchDropout(theirs, 16).train()
    ours.draw(torch.empty(8, 3, 4, 4), torch.Generator().manual_seed(3))
    assert abs(ours.noise.mean()) < 0.3 and 0.8 < ours.noise.std() < 1.2
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: ours.noise.clone())
    expected = theirs(TOKENS)
    found = ours(TOKENS)
    assert torch.equal(found, expected)
    assert found.shape == (8, 1 + 11, 2) and torch.equal(found[:, 0], TOKENS[:, 0])


def test_parts_of_a_batch_take_its_noise_in_turn_and_a_new_batch_begins_anew():
    module = NoisePatchDropout(PatchDropout(0.5), 16).train()
    module.draw(torch.empty(8, 3, 4, 4), torch.Generator().manual_seed(3))
    address = module.noise.data_ptr()
    whole = module(TOKENS)
    assert torch.equal(torch.cat([module(part) for part in TOKENS.chunk(4)]), whole)
    module.draw(torch.empty(8, 3, 4, 4), torch.Generator().manual_seed(4))
    assert module.noise.data_ptr() == address  # a captured step reads it there
    assert not torch.equal(module(TOKENS), whole)


def test_nothing_is_left_out_in_eval_mode_or_at_a_rate_of_zero():
    module = NoisePatchDropout(PatchDropout(0.5), 16)
    assert module.eval()(TOKENS) is TOKENS
    module.train().prob = 0.0
    assert module(TOKENS) is TOKENS


def test_its_noise_is_of_the_numbers_of_the_step():
    _, one = noise_of((1, 2), (1, 3), (1, 2))
    before = torch.get_rng_state()
    module, other = noise_of((1, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert module.noise.shape == (4, 16)
    for i in range(2):  # parts
        assert torch.equal(one[i], one[4 + i]) and torch.equal(one[2 + i], other[i])
        assert not torch.equal(one[i], other[i])
    assert not torch.equal(one[0] - TOKENS[0, 0], one[1] - TOKENS[0, 0])
