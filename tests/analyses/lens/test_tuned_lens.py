"""Lenses: what the head reads by hand, and the tuned map against numpy's ridge regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bvit_interp.analyses.lens.tuned_lens import (
    RATE,
    RIDGE,
    Translator,
    cached_states,
    fit,
    grouped,
    kinds,
    look,
    make_lenses,
    read,
)
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def divergence(model, translator, tokens, answers):
    log_p, log_q = (
        answers.double().log_softmax(-1),
        read(model, translator(tokens)).double().log_softmax(-1),
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


# ---- reading -------------------------------------------------------------------------------------------


def test_after_the_last_step_cls_is_the_models_own_answer(any_model, images):
    view = unroll(any_model)
    with torch.no_grad():
        final = Probe(view).record(images, "resid_post", len(view.blocks))[
            "resid_post", len(view.blocks)
        ]
        logits = read(view, grouped(final[:, kinds(view)["cls"]], "cls"))
        torch.testing.assert_close(logits[:, 0], any_model(images))


def test_every_kind_of_token_is_where_the_probe_has_it(any_model, images):
    view = unroll(any_model)
    probe = Probe(view)
    count = view.num_prefix_tokens + view.patch_embed.num_patches
    found = kinds(view)
    assert range(count)[found["patches"]] == range(count)[probe.rows("patches", count)[0]]
    registers = view.num_prefix_tokens - (1 if getattr(view, "dist_token", None) is None else 2)
    assert ("reg" in found) == (registers > 0)
    if registers:
        assert range(count)[found["reg"]] == range(count)[probe.rows("reg", count)[0]]


def test_patches_are_read_by_hand_at_every_step(tiny, images, by_hand):
    lenses = {("raw", "patches"): [None] * 12}
    with torch.no_grad():
        logits = look(unroll(tiny), images, lenses)["raw", "patches"]
        sites = by_hand.run(tiny, images, [tiny.blocks[0]] * 12)
        for t in (1, 5, 12):
            z = sites[t]["resid_post"]
            for place in (0, 7, 15):
                expected = by_hand.logits(tiny, z[:, 1 + place :])  # its first row is read
                torch.testing.assert_close(logits[t - 1][:, place], expected, rtol=1e-4, atol=1e-4)


def test_a_single_token_stands_in_for_both_that_a_distilled_head_reads(tiny_distilled):
    tokens = drawn(3, 1, 32)
    normed = tiny_distilled.norm(tokens[:, 0])
    expected = (tiny_distilled.head(normed) + tiny_distilled.head_dist(normed)) / 2
    torch.testing.assert_close(read(tiny_distilled, tokens), expected)


def test_a_head_that_pools_is_refused(make):
    with pytest.raises(UserError, match="global_pool must be token, got 'avg'"):
        kinds(make(global_pool="avg"))


# ---- tuning --------------------------------------------------------------------------------------------


def test_without_gradient_steps_it_is_numpys_ridge_regression(tiny):
    mixing = drawn(32, 32, seed=3)
    x, y = drawn(200, 1, 32) @ mixing + 2, drawn(200, 1, 32, seed=1)
    found = fit(tiny, x, y, drawn(200, 10), iterations=0)
    a, b = x[:, 0].double().numpy(), y[:, 0].double().numpy()
    centred = a - a.mean(0)
    penalty = np.sqrt(200 * RIDGE * (centred**2).mean()) * np.eye(32)
    weight = np.linalg.lstsq(
        np.vstack([centred, penalty]), np.vstack([b - b.mean(0), np.zeros((32, 32))]), rcond=None
    )[0]
    np.testing.assert_allclose(found.weight[0], weight, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.bias[0], b.mean(0) - a.mean(0) @ weight, rtol=1e-3, atol=1e-4)


def test_each_of_two_tokens_has_its_own_map(tiny_distilled):
    x, y, answers = drawn(60, 2, 32), drawn(60, 2, 32, seed=1), drawn(60, 10, seed=2)
    found = fit(tiny_distilled, x, y, answers, iterations=0)
    moved = found(x)
    for k in range(2):
        torch.testing.assert_close(moved[:, k], x[:, k] @ found.weight[k] + found.bias[k])
    assert (moved - y).square().mean() < 0.6 * (y - y.mean(0)).square().mean()
    assert not torch.allclose(found.weight[0], found.weight[1], atol=0.1)


def test_gradient_steps_bring_the_answers_closer_and_leave_the_model_alone(tiny):
    tokens, final = drawn(300, 1, 32), drawn(300, 1, 32, seed=1)
    answers = read(tiny, final + tokens).detach()
    before = [parameter.clone() for parameter in tiny.parameters()]
    start, end = (fit(tiny, tokens, final, answers, iterations=n) for n in (0, 40))
    assert divergence(tiny, end, tokens, answers) < 0.7 * divergence(tiny, start, tokens, answers)
    assert all(
        torch.equal(parameter, old)
        for parameter, old in zip(tiny.parameters(), before, strict=True)
    )
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_the_first_gradient_step_is_downhill_and_as_long_as_said(tiny):
    """In units in which the states vary by 1: a tenth of the rate, for the running mean has seen
    one gradient."""
    tokens, final, answers = drawn(80, 1, 32), 3 * drawn(80, 1, 32, seed=1), drawn(80, 10, seed=2)
    start, end = (fit(tiny, tokens, final, answers, iterations=n) for n in (0, 1))
    mean = tokens.double().mean(0)
    scale = (tokens.double() - mean).square().mean().sqrt()
    of_weight = scale * (end.weight - start.weight).double()
    of_bias = (end.bias - start.bias).double() + mean @ (end.weight - start.weight).double()[0]
    length = (of_weight.square().sum() + of_bias.square().sum()).sqrt().item()
    spread = (final.double() - final.double().mean(0)).square().mean().sqrt().item()
    assert length == pytest.approx(0.1 * RATE * math.sqrt(32) * spread, rel=1e-3)
    assert divergence(tiny, end, tokens, answers) < divergence(tiny, start, tokens, answers)


def test_states_that_do_not_vary_are_carried_to_the_mean(tiny):
    final, answers = drawn(5, 1, 32), drawn(5, 10)
    found = fit(tiny, torch.ones(5, 1, 32), final, answers, iterations=0)
    torch.testing.assert_close(found(torch.ones(1, 1, 32))[0], final.mean(0))


# ---- running -------------------------------------------------------------------------------------------


def test_cached_states_are_the_probes(any_model, images):
    view, index = unroll(any_model), torch.tensor([3, 0, 11, 5])
    found = cached_states(view, images, index, most=2)
    states = Probe(view).record(images, "resid_post")["resid_post"]  # (B, T, N, D)
    own = states[:, :, kinds(view)["cls"]]
    torch.testing.assert_close(found["cls"], own[:, :, None])
    torch.testing.assert_close(found["answers"], any_model(images))
    patches = states[:, :, kinds(view)["patches"]]
    for i in range(4):
        for m in range(2):
            turn = (int(index[i]) * 2 + m) * (math.sqrt(5) - 1) / 2
            place = int((turn % 1) * 16)
            torch.testing.assert_close(found["patches"][i, :, m, 0], patches[i, :, place])


def test_every_patch_is_cached_about_as_often(tiny):
    """And the same of an image whatever batch it comes in."""
    from bvit_interp.analyses.lens.tuned_lens import _spread_over

    places = _spread_over(torch.arange(400), 16, 4)
    counts = torch.bincount(places.flatten(), minlength=16)
    assert counts.min() >= 95
    assert counts.max() <= 105
    assert torch.equal(_spread_over(torch.tensor([17, 300]), 16, 4), places[[17, 300]])
    assert _spread_over(torch.arange(3), 4, 4).tolist() == [[0, 1, 2, 3]] * 3


def test_make_lenses_pairs_states_with_answers_of_the_same_image_but_for_the_shuffled(tiny_reg4):
    view, images = unroll(tiny_reg4), drawn(12, 3, 32, 32)
    cached = {
        key: tensor.flatten(1)
        for key, tensor in cached_states(view, images, torch.arange(12), 3).items()
    }
    lenses = make_lenses(view, cached, iterations=2, seed=4)
    assert list(lenses) == [
        ("raw", "cls"),
        ("tuned", "cls"),
        ("shuffled", "cls"),
        ("raw", "reg"),
        ("tuned", "reg"),
        ("raw", "patches"),
        ("tuned", "patches"),
    ]
    states = cached_states(view, images, torch.arange(12), 3)
    final, answers = states["cls"][:, -1, 0], states["answers"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    cls = states["cls"][:, 4, 0]
    for lens, expected in (
        ("tuned", fit(view, cls, final, answers, 2)),
        ("shuffled", fit(view, cls, final[order], answers[order], 2)),
    ):
        torch.testing.assert_close(lenses[lens, "cls"][4].weight, expected.weight)
    rows = states["patches"][:, 4].flatten(0, 1)
    expected = fit(view, rows, final.repeat_interleave(3, 0), answers.repeat_interleave(3, 0), 2)
    torch.testing.assert_close(lenses["tuned", "patches"][4].bias, expected.bias)


def test_look_reads_behind_the_map_of_each_step(tiny, images):
    maps = [Translator(drawn(1, 32, 32, seed=t), drawn(1, 32, seed=50 + t)) for t in range(12)]
    view = unroll(tiny)
    found = look(view, images, {("tuned", "cls"): maps, ("tuned", "patches"): maps})
    states = Probe(view).record(images, "resid_post")["resid_post"]
    with torch.no_grad():
        for t in (0, 6, 11):
            for kind, place in (("cls", 0), ("patches", 4)):
                row = (
                    states[:, t, place + (kind == "patches")] @ maps[t].weight[0] + maps[t].bias[0]
                )
                expected = tiny.head(tiny.norm(row))
                torch.testing.assert_close(
                    found["tuned", kind][t][:, place], expected, rtol=1e-4, atol=1e-4
                )


def test_nan_is_refused(tiny, images):
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        cached_states(unroll(tiny), images, torch.arange(4), 4)
