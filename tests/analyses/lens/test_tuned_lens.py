"""Lenses by hand, and the tuned map against numpy's ridge regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from foreign import LoopedTimm, foreign
from jaxtyping import TypeCheckError

from bvit_interp.analyses.lens.tuned_lens import (
    LEARNING_RATE,
    RIDGE,
    Translator,
    _chosen_tokens,
    cached_states,
    fit_lenses,
    fit_translator,
    head_logits,
    head_of,
    lens_logits,
    read_together,
    token_groups,
)
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll, with_steps
from bvit_interp.probes.probe import Probe


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def divergence(model, translator, tokens, logits):
    log_p, log_q = (
        logits.double().log_softmax(-1),
        head_logits(model, translator(tokens)).double().log_softmax(-1),
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


# ---- reading -------------------------------------------------------------------------------------


def test_after_the_last_step_cls_is_the_models_own_answer(any_model, images):
    view = unroll(any_model)
    with torch.no_grad():
        final = Probe(view).record(images, "resid_post", len(view.blocks))[
            "resid_post", len(view.blocks)
        ]
        logits = head_logits(view, read_together(final[:, token_groups(view)["cls"]], "cls"))
        torch.testing.assert_close(logits[:, 0], any_model(images))


def test_every_kind_of_token_is_where_the_probe_has_it(any_model, images):
    view = unroll(any_model)
    probe = Probe(view)
    count = view.num_prefix_tokens + view.patch_embed.num_patches
    found = token_groups(view)
    assert range(count)[found["patches"]] == range(count)[probe.rows("patches", count)[0]]
    registers = view.num_prefix_tokens - (1 if getattr(view, "dist_token", None) is None else 2)
    assert ("reg" in found) == (registers > 0)
    if registers:
        assert range(count)[found["reg"]] == range(count)[probe.rows("reg", count)[0]]


def test_patches_are_read_by_hand_at_every_step(tiny, images, by_hand):
    lenses = {("raw", "patches"): [None] * 12}
    with torch.no_grad():
        logits = lens_logits(unroll(tiny), images, lenses)["raw", "patches"]
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
    torch.testing.assert_close(head_logits(tiny_distilled, tokens), expected)


def test_tokens_are_read_one_by_one_where_the_head_reads_cls_alone(tiny, tiny_distilled, make):
    """A user's timm model counts as long as nothing comes between its last step and the head."""

    class WithMore(LoopedTimm):
        def forward_features(self, x, attn_mask=None, is_causal=False):
            return super().forward_features(x).roll(1, -1)

    assert head_of(tiny) is tiny and head_of(tiny_distilled) is tiny_distilled
    looped = with_steps(foreign("looped_timm"))
    assert head_of(looped) is looped.model
    assert head_of(make(global_pool="avg")) is None
    assert head_of(with_steps(WithMore().eval())) is None
    for kind in ("encoder", "prelude", "two_state", "dinov3", "torchvision"):
        assert head_of(with_steps(foreign(kind))) is None


# ---- tuning --------------------------------------------------------------------------------------


def test_without_gradient_steps_it_is_numpys_ridge_regression(tiny):
    mixing = drawn(32, 32, seed=3)
    x, y = drawn(200, 1, 32) @ mixing + 2, drawn(200, 1, 32, seed=1)
    found = fit_translator(tiny, x, y, drawn(200, 10), iterations=0)
    a, b = x[:, 0].double().numpy(), y[:, 0].double().numpy()
    centred = a - a.mean(0)
    penalty = np.sqrt(200 * RIDGE * (centred**2).mean()) * np.eye(32)
    weight = np.linalg.lstsq(
        np.vstack([centred, penalty]), np.vstack([b - b.mean(0), np.zeros((32, 32))]), rcond=None
    )[0]
    np.testing.assert_allclose(found.weight[0], weight, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.bias[0], b.mean(0) - a.mean(0) @ weight, rtol=1e-3, atol=1e-4)


def test_each_of_two_tokens_has_its_own_map(tiny_distilled):
    x, y, logits = drawn(60, 2, 32), drawn(60, 2, 32, seed=1), drawn(60, 10, seed=2)
    found = fit_translator(tiny_distilled, x, y, logits, iterations=0)
    moved = found(x)
    for k in range(2):
        torch.testing.assert_close(moved[:, k], x[:, k] @ found.weight[k] + found.bias[k])
    assert (moved - y).square().mean() < 0.6 * (y - y.mean(0)).square().mean()
    assert not torch.allclose(found.weight[0], found.weight[1], atol=0.1)


def test_gradient_steps_bring_the_predictions_closer_and_leave_the_model_alone(tiny):
    tokens, final = drawn(300, 1, 32), drawn(300, 1, 32, seed=1)
    logits = head_logits(tiny, final + tokens).detach()
    before = [parameter.clone() for parameter in tiny.parameters()]
    start, end = (fit_translator(tiny, tokens, final, logits, iterations=n) for n in (0, 40))
    assert divergence(tiny, end, tokens, logits) < 0.7 * divergence(tiny, start, tokens, logits)
    assert all(
        torch.equal(parameter, old)
        for parameter, old in zip(tiny.parameters(), before, strict=True)
    )
    assert all(parameter.grad is None for parameter in tiny.parameters())


def test_the_first_gradient_step_is_downhill_and_as_long_as_said(tiny):
    """In units in which the states vary by 1: a tenth of the rate, for the running mean has seen
    one gradient."""
    tokens, final, logits = drawn(80, 1, 32), 3 * drawn(80, 1, 32, seed=1), drawn(80, 10, seed=2)
    start, end = (fit_translator(tiny, tokens, final, logits, iterations=n) for n in (0, 1))
    mean = tokens.double().mean(0)
    scale = (tokens.double() - mean).square().mean().sqrt()
    of_weight = scale * (end.weight - start.weight).double()
    of_bias = (end.bias - start.bias).double() + mean @ (end.weight - start.weight).double()[0]
    length = (of_weight.square().sum() + of_bias.square().sum()).sqrt().item()
    spread = (final.double() - final.double().mean(0)).square().mean().sqrt().item()
    assert length == pytest.approx(0.1 * LEARNING_RATE * math.sqrt(32) * spread, rel=1e-3)
    assert divergence(tiny, end, tokens, logits) < divergence(tiny, start, tokens, logits)


def test_states_that_do_not_vary_are_carried_to_the_mean(tiny):
    final, logits = drawn(5, 1, 32), drawn(5, 10)
    found = fit_translator(tiny, torch.ones(5, 1, 32), final, logits, iterations=0)
    torch.testing.assert_close(found(torch.ones(1, 1, 32))[0], final.mean(0))


# ---- running -------------------------------------------------------------------------------------


def test_cached_states_are_the_probes(any_model, images):
    view, index = unroll(any_model), torch.tensor([3, 0, 11, 5])
    found = cached_states(view, images, index, n_tokens=2)
    states = Probe(view).record(images, "resid_post")["resid_post"]  # (B, T, N, D)
    own = states[:, :, token_groups(view)["cls"]]
    torch.testing.assert_close(found["cls"], own[:, :, None])
    torch.testing.assert_close(found["logits"], any_model(images))
    patches = states[:, :, token_groups(view)["patches"]]
    for i in range(4):
        for m in range(2):
            turn = (int(index[i]) * 2 + m) * (math.sqrt(5) - 1) / 2
            place = int((turn % 1) * 16)
            torch.testing.assert_close(found["patches"][i, :, m, 0], patches[i, :, place])


def test_every_patch_is_cached_about_as_often(tiny):
    """And the same of an image whatever batch it comes in."""
    places = _chosen_tokens(torch.arange(400), 16, 4)
    counts = torch.bincount(places.flatten(), minlength=16)
    assert counts.min() >= 95
    assert counts.max() <= 105
    assert torch.equal(_chosen_tokens(torch.tensor([17, 300]), 16, 4), places[[17, 300]])
    assert _chosen_tokens(torch.arange(3), 4, 4).tolist() == [[0, 1, 2, 3]] * 3


def test_fit_lenses_pairs_states_with_logits_of_the_same_image_but_for_the_shuffled(tiny_reg4):
    view, images = unroll(tiny_reg4), drawn(12, 3, 32, 32)
    cached = {
        key: tensor.flatten(1)
        for key, tensor in cached_states(view, images, torch.arange(12), 3).items()
    }
    lenses = fit_lenses(view, cached, iterations=2, seed=4)
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
    final, logits = states["cls"][:, -1, 0], states["logits"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    cls = states["cls"][:, 4, 0]
    for lens, expected in (
        ("tuned", fit_translator(view, cls, final, logits, 2)),
        ("shuffled", fit_translator(view, cls, final[order], logits[order], 2)),
    ):
        torch.testing.assert_close(lenses[lens, "cls"][4].weight, expected.weight)
    rows = states["patches"][:, 4].flatten(0, 1)
    expected = fit_translator(
        view, rows, final.repeat_interleave(3, 0), logits.repeat_interleave(3, 0), 2
    )
    torch.testing.assert_close(lenses["tuned", "patches"][4].bias, expected.bias)


def test_lens_logits_are_read_after_the_map_of_each_step(tiny, images):
    maps = [Translator(drawn(1, 32, 32, seed=t), drawn(1, 32, seed=50 + t)) for t in range(12)]
    view = unroll(tiny)
    found = lens_logits(view, images, {("tuned", "cls"): maps, ("tuned", "patches"): maps})
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


def test_other_shapes_are_refused(tiny, images):
    with pytest.raises(TypeCheckError):
        fit_translator(tiny, drawn(9, 1, 32), drawn(8, 1, 32), drawn(9, 10), iterations=0)
    with pytest.raises(TypeCheckError):
        cached_states(unroll(tiny), images, torch.arange(3), 4)
    with pytest.raises(TypeCheckError):
        read_together(drawn(4, 32), "cls")
