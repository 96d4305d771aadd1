"""Patterns made by chosen q and k, the forward written by hand, and rollout in a plain numpy
loop."""

from __future__ import annotations

import math
import weakref

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

from bvit_interp.analyses.attention import patterns as module
from bvit_interp.analyses.attention.patterns import (
    attention_statistics,
    metric_names,
    uniform_value,
)
from bvit_interp.errors import UserError
from bvit_interp.probes import saliency
from bvit_interp.probes.probe import Probe


class Chosen(nn.Module):
    """Stands in for `attn.qkv`: the same q and k, ``(N, H, E)``, for every input."""

    def __init__(self, q, k):
        super().__init__()
        self.register_buffer(
            "fused", torch.stack([q, k, torch.zeros_like(q)]).permute(1, 0, 2, 3).flatten(1)
        )

    def forward(self, x):
        return self.fused.expand(len(x), -1, -1)


def distances_by_hand(grid, query=None):
    places = [(row, col) for row in range(grid[0]) for col in range(grid[1])]
    return [math.dist(a, b) for b in places for a in (places if query is None else [places[query]])]


def statistics_by_hand(pattern, probe):
    """Loops over queries of one image's ``(H, N, N)``: the definitions read aloud."""
    first = probe.num_prefix_tokens
    cls = pattern[:, 0]
    found = {
        "attention_entropy": -(cls * np.log(cls)).sum(-1),
        "patches_to_cls": pattern[:, first:, 0].mean(-1),
    }
    found |= {f"cls_to_{kind}": cls[:, rows].sum(-1) for kind, rows in probe.kinds().items()}
    found["attention_distance"] = np.zeros(len(pattern))
    places = [(row, col) for row in range(probe.grid[0]) for col in range(probe.grid[1])]
    for head, table in enumerate(pattern[:, first:, first:]):
        for query, row in zip(places, table, strict=True):
            weighted = sum(a * math.dist(query, key) for a, key in zip(row, places, strict=True))
            found["attention_distance"][head] += weighted / row.sum() / len(places)
    return found


def test_patterns_of_chosen_q_and_k(tiny, images):
    """Four heads: uniform; each token on itself; all on CLS; all on the patch of the upper left
    corner."""
    angle = 2 * math.pi * torch.arange(17) / 17
    q, k = torch.zeros(17, 4, 8), torch.zeros(17, 4, 8)
    q[:, 1, :2] = k[:, 1, :2] = 60 * torch.stack([angle.cos(), angle.sin()], -1)
    q[:, 2, 0] = q[:, 3, 0] = k[0, 2, 0] = k[1, 3, 0] = 16
    tiny.blocks[0].attn.qkv = Chosen(q, k)
    found = attention_statistics(Probe(tiny), images)
    mean = np.mean(distances_by_hand((4, 4)))
    expected = {
        "attention_entropy": [math.log(17), 0, 0, 0],
        # head 2 leaves almost nothing on patches, and that evenly
        "attention_distance": [mean, 0, mean, np.mean(distances_by_hand((4, 4), query=0))],
        "cls_to_cls": [1 / 17, 1, 1, 0],
        "cls_to_patches": [16 / 17, 0, 0, 1],
        "patches_to_cls": [1 / 17, 0, 1, 0],
    }
    assert set(expected) == set(found.metrics) == set(metric_names(Probe(tiny)))
    for name, values in expected.items():
        np.testing.assert_allclose(
            found.metrics[name], np.tile(values, (4, 12, 1)), atol=2e-6, err_msg=name
        )
    corner = found.maps[0, 0, 3]
    assert corner[0] == pytest.approx(1)
    # CLS row of the first rollout: half on itself, half the mean of (1/17, 1, 1, 0)
    assert found.rollout[0, 0, 0] == pytest.approx(0.5 + (1 / 17 + 2) / 8)
    assert found.rollout[0, 0, 1] == pytest.approx((1 / 17 + 1) / 8)


def test_against_the_forward_written_by_hand(tiny, tiny_reg4, images, by_hand):
    for model in (tiny, tiny_reg4):
        probe = Probe(model)
        found = attention_statistics(probe, images)
        with torch.no_grad():
            sites = by_hand.run(model, images, [model.blocks[0]] * 12)[1:]
        for t, site in enumerate(sites):
            for image in range(2):
                expected = statistics_by_hand(site["pattern"][image].double().numpy(), probe)
                assert set(expected) == set(found.metrics)
                for name, values in expected.items():
                    np.testing.assert_allclose(
                        found.metrics[name][image, t], values, rtol=2e-4, atol=1e-6
                    )


def test_kinds_of_tokens_by_their_positions(tiny_distilled, images):
    """CLS, the distillation token, two registers, then sixteen patches."""
    probe = Probe(tiny_distilled)
    values = attention_statistics(probe, images).metrics
    cls = probe.run(images, "pattern", 3)[1]["pattern", 3].detach().double()[:, :, 0]
    positions = {
        "cls": slice(0, 1),
        "dist": slice(1, 2),
        "reg": slice(2, 4),
        "patches": slice(4, 20),
    }
    for kind, keys in positions.items():
        np.testing.assert_allclose(
            values[f"cls_to_{kind}"][:, 2], cls[..., keys].sum(-1), atol=1e-6
        )
        share = (keys.stop - keys.start) / 20
        assert uniform_value(probe, f"cls_to_{kind}") == pytest.approx(share)
    assert uniform_value(probe, "patches_to_cls") == pytest.approx(1 / 20)


def test_every_kind_of_model(any_model, images):
    probe = Probe(any_model)
    found = attention_statistics(probe, images)
    patterns = probe.run(images, "pattern")[1]["pattern"].detach().double().numpy()
    for t in range(probe.num_steps):
        for name, values in statistics_by_hand(patterns[1, t], probe).items():
            np.testing.assert_allclose(
                found.metrics[name][1, t], values, rtol=1e-4, atol=1e-6, err_msg=name
            )
    np.testing.assert_allclose(found.maps, saliency.attention(probe, images), atol=1e-6)
    groups = probe.kinds()
    total = sum(found.metrics[f"cls_to_{kind}"] for kind in groups)
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_rollout_in_a_numpy_loop(any_model, images):
    probe = Probe(any_model)
    found = attention_statistics(probe, images).rollout
    patterns = probe.run(images, "pattern")[1]["pattern"].detach().double().numpy()
    for i in range(len(images)):
        rolled = np.eye(patterns.shape[-1])
        for t in range(probe.num_steps):
            layer = patterns[i, t].mean(0) + np.eye(len(rolled))
            rolled = layer / layer.sum(-1, keepdims=True) @ rolled
            np.testing.assert_allclose(found[i, t], rolled[0], atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_the_output_is_untouched_and_fused_attention_stays_on(any_model, images, monkeypatch):
    probe = Probe(any_model)
    with torch.no_grad():
        before = any_model(images)
    outputs, calls = [], []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (calls.append(1), fused(*a, **k))[1],
    )
    with probe.model.register_forward_hook(lambda _, __, output: outputs.append(output)):
        attention_statistics(probe, images)
    assert torch.equal(outputs[0], before)
    assert len(calls) >= probe.num_steps


def test_one_pattern_at_a_time(tiny, images, monkeypatch):
    """When a step is reduced, the patterns of the steps before it are gone."""
    alive, reduced = [], module._reduce_step

    def watched(pattern, *others):
        assert not [where for where in alive if where() is not None]
        alive.append(weakref.ref(pattern.untyped_storage()))
        alive.append(weakref.ref(pattern))
        return reduced(pattern, *others)

    monkeypatch.setattr(module, "_reduce_step", watched)
    attention_statistics(Probe(tiny), images)
    assert len(alive) == 24


def test_uniform_attention_is_its_null(any_model, images):
    """q and k of zeros: every statistic equals `uniform`, and so does the entropy of the
    rollout."""
    width = any_model.embed_dim
    with torch.no_grad():
        for block in any_model.blocks.children():
            block.attn.qkv.weight[: 2 * width] = 0
            block.attn.qkv.bias[: 2 * width] = 0
    probe = Probe(any_model)
    found = attention_statistics(probe, images)
    for name, values in found.metrics.items():
        np.testing.assert_allclose(values, uniform_value(probe, name), rtol=1e-6, err_msg=name)
    for t in range(1, probe.num_steps + 1):
        row = found.rollout[:, t - 1]
        entropy = -(row * row.log()).sum(-1)
        np.testing.assert_allclose(entropy, uniform_value(probe, "rollout_entropy", t), rtol=1e-5)
        if t == 1:
            np.testing.assert_allclose(entropy, uniform_value(probe, "rollout_entropy"), rtol=1e-5)


def test_the_distance_of_uniform_attention_in_closed_form(make):
    """(R - |dr|) (C - |dc|) pairs of patches lie dr rows and dc columns apart."""
    probe = Probe(make(img_size=(24, 40)))
    rows, cols = probe.grid
    assert (rows, cols) == (3, 5)
    total = sum(
        (rows - abs(dr)) * (cols - abs(dc)) * math.hypot(dr, dc)
        for dr in range(-2, 3)
        for dc in range(-4, 5)
    )
    assert uniform_value(probe, "attention_distance") == pytest.approx(total / (rows * cols) ** 2)


def test_without_cls_there_is_the_distance_alone(make, images):
    probe = Probe(make(name="vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg"))
    found = attention_statistics(probe, images)
    assert metric_names(probe) == list(found.metrics) == ["attention_distance"]
    assert found.maps is None
    assert found.rollout is None


def test_wrong_shapes_are_refused(tiny, images):
    with pytest.raises(jaxtyping.TypeCheckError):
        attention_statistics(Probe(tiny), images[0])


def test_bad_input(make, tiny, images):
    with pytest.raises(UserError, match="give 17 tokens, got 65"):
        attention_statistics(Probe(make(dynamic_img_size=True)), torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        tiny.blocks[0].attn.qkv.weight.mul_(1e30)
    with pytest.raises(UserError, match="attention weights of step 1 hold NaN or infinite"):
        attention_statistics(Probe(tiny), images)
