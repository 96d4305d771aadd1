"""Ablated runs against whole runs with a hook written by hand; the analysis of variance against its
textbook form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from bvit_interp.analyses.ablation.effects import ANSWERS, Ablator, steps_and_units
from bvit_interp.errors import UserError
from bvit_interp.models.unroll import unroll
from bvit_interp.probes.probe import Probe

MODULES = {"z": "attn.proj", "mlp_post": "mlp.fc2"}
LABELS = torch.tensor([3, 1, 4, 1])


def whole_run(model, images, site, channels, span, fill):
    """Logits with the channels of a site's flat activation ``(B, N, D or F)`` replaced by those of
    fill(step)."""
    view = unroll(model)
    for t in range(span[0], span[1] + 1):

        def replace(_, args, t=t):
            new = args[0].clone()
            new[..., channels] = 0.0 if fill is None else fill(t)[..., channels]
            return (new,)

        view.blocks[t - 1].get_submodule(MODULES[site]).register_forward_pre_hook(replace)
    return view(images)


def said(clean, ablated, labels):
    """The four changes, image by image."""
    rows = []
    for old, new, label in zip(clean.double(), ablated.double(), labels, strict=True):
        p, q = old.softmax(0), new.softmax(0)
        rows.append(
            [
                float(new.argmax() == label) - float(old.argmax() == label),
                float(new[label] - old[label]),
                float((q[label] / p[label]).log()),
                float((p * (p / q).log()).sum()),
            ]
        )
    return np.array(rows)


def test_effects_are_whole_runs_with_a_hook(any_model, images):
    ablator, others = Ablator(any_model, groups=3, seed=5), images.flip(0) + 0.3
    last, heads = ablator.probe.num_steps, ablator.probe.num_heads
    methods = ["zero", "mean", "resample"]
    spans = [(1, 1), (2, last)]
    with torch.inference_mode():
        found = Probe(any_model).record(images, ["z", "mlp_post"])
        given = Probe(any_model).record(others, ["z", "mlp_post"])
        for site, total in ablator.sums(images).items():
            ablator.means[site] = total / len(images)
            mean = torch.stack([found[site, t].mean(0) for t in range(1, last + 1)])
            assert torch.allclose(ablator.means[site].float(), mean, atol=1e-5)
        effects = ablator.effects(images, LABELS, methods, spans, others)
        width = any_model.embed_dim // heads
        order = torch.randperm(heads * width, generator=torch.Generator().manual_seed(5))
        channels = [("z", list(range(h * width, (h + 1) * width))) for h in range(heads)] + [
            ("z", order[:width].tolist())
        ]
        bounds = [
            -(-ablator.probe.num_neurons * g // 3) for g in range(4)
        ]  # three runs of neighbours
        channels += [("mlp_post", list(range(*pair))) for pair in itertools.pairwise(bounds)]
        assert effects.shape == (4, 3, len(channels), len(spans), len(ANSWERS))
        clean = any_model(images)
        for (u, (site, which)), (s, span), (m, method) in itertools.product(
            enumerate(channels[heads - 1 : heads + 2], start=heads - 1),
            enumerate(spans),
            enumerate(methods),
        ):
            fill = {
                "zero": None,
                "mean": lambda t, site=site: found[site, t].mean(0).flatten(1),
                "resample": lambda t, site=site: given[site, t].flatten(2),
            }[method]
            expected = said(clean, whole_run(any_model, images, site, which, span, fill), LABELS)
            np.testing.assert_allclose(
                effects[:, m, u, s], expected, atol=2e-4, err_msg=f"{method} {u} {span}"
            )
        assert effects[..., 3].abs().amin(0).max() > 1e-4


def test_variants_that_do_not_fit_at_once_are_run_in_turn(tiny, images, monkeypatch):
    ablator = Ablator(tiny, groups=0)
    with torch.inference_mode():
        whole = ablator.effects(images, LABELS, ["zero"], [(3, 12)])
        monkeypatch.setattr("bvit_interp.analyses.ablation.effects._BYTES_OF_A_RUN", 1)
        torch.testing.assert_close(
            ablator.effects(images, LABELS, ["zero"], [(3, 12)]), whole, rtol=1e-4, atol=1e-5
        )


def test_one_head_is_its_own_null(make, images):
    ablator = Ablator(make(num_heads=1, num_steps=3), groups=0)
    with torch.inference_mode():
        head, null = ablator.effects(images, LABELS, ["zero"], [(2, 3)])[:, 0, :, 0].unbind(1)
    torch.testing.assert_close(head, null)


def test_what_cannot_be_done_is_refused(tiny, images, monkeypatch):
    with pytest.raises(UserError, match="groups: 0..128"):
        Ablator(tiny, groups=129)
    nn.init.constant_(tiny.head.weight, torch.nan)
    with pytest.raises(UserError, match="logits hold NaN"), torch.inference_mode():
        Ablator(tiny, groups=0).effects(images, LABELS, ["zero"], [(12, 12)])
    monkeypatch.setattr("bvit_interp.analyses.ablation.effects._BYTES_OF_MEANS", 1)
    with pytest.raises(UserError, match="means of every step"):
        Ablator(tiny, groups=0).site_means()


def same_in_all_folds(table):
    return np.repeat(np.asarray(table, float)[None], 10, axis=0), np.full(10, 7)


def test_shares_without_noise_are_those_of_the_textbook():
    table = np.random.default_rng(0).normal(size=(5, 3)) + np.arange(5)[:, None]
    found = steps_and_units(*same_in_all_folds(table))
    total = ((table - table.mean()) ** 2).sum()
    of_steps = 3 * ((table.mean(1) - table.mean()) ** 2).sum()
    of_units = 5 * ((table.mean(0) - table.mean()) ** 2).sum()
    both = sum(
        (table[t, u] - table[t].mean() - table[:, u].mean() + table.mean()) ** 2
        for t in range(5)
        for u in range(3)
    )
    for name, expected in (("steps", of_steps), ("units", of_units), ("both", both)):
        row = found[f"variance_{name}"]
        assert [row["value"], row["low"], row["high"]] == pytest.approx([expected / total] * 3)
    assert found["reliability"]["value"] == pytest.approx(1.0)


def test_nulls_are_means_over_all_shuffles():
    table = np.random.default_rng(1).normal(size=(3, 3)) + np.array([0.0, 1.0, 2.0])
    found = steps_and_units(*same_in_all_folds(table))
    orders = [list(order) for order in itertools.permutations(range(3))]
    shares = []
    for chosen in itertools.product(orders, repeat=3):
        shuffled = np.array([row[order] for row, order in zip(table, chosen, strict=True)])
        total = ((shuffled - shuffled.mean()) ** 2).sum()
        shares.append(3 * ((shuffled.mean(0) - shuffled.mean()) ** 2).sum() / total)
    units = found["variance_units"]
    assert units["null"] == pytest.approx(np.mean(shares))
    assert found["variance_both"]["null"] == pytest.approx(
        1 - found["variance_steps"]["value"] - units["null"]
    )
    across = steps_and_units(*same_in_all_folds(table.T))[
        "variance_units"
    ]  # steps within units are units within steps
    assert found["variance_steps"]["null"] == pytest.approx(across["null"])
    assert found["variance_steps"]["value"] == pytest.approx(across["value"])


def test_noise_of_images_is_no_interaction():
    rng, found = np.random.default_rng(2), []
    table = np.arange(6.0)[:, None] + np.array([0.0, 3.0, 1.0])  # steps and units add up
    for _ in range(60):
        folds = table + rng.normal(scale=3, size=(10, 6, 3))
        rows = steps_and_units(folds, np.full(10, 5), draws=1)
        found.append([rows[f"variance_{name}"]["value"] for name in ("units", "both")])
        noisy = folds.mean(0)
        rest = noisy - noisy.mean(0) - noisy.mean(1, keepdims=True) + noisy.mean()
        found[-1].append(rest.var() / noisy.var())
    units, both, plain = np.mean(found, axis=0)
    assert abs(both) < 0.05
    assert plain > 0.08
    expected = table.mean(0).var() / table.var()
    assert units == pytest.approx(expected, abs=0.05)


def test_reliability_is_the_correlation_of_the_halves():
    rng = np.random.default_rng(3)
    folds, counts = rng.normal(size=(10, 4, 3)) + rng.normal(size=(4, 3)), np.array([3, 2] * 5)
    row = steps_and_units(folds, counts)["reliability"]
    halves = [folds[k::2].mean(0) for k in range(2)]
    halves = [half - half.mean(1, keepdims=True) for half in halves]
    assert row["value"] == pytest.approx(np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1])
    assert row["null"] == 0
    alike = steps_and_units(*same_in_all_folds(rng.normal(size=(4, 3))))["reliability"]
    assert alike["p_value"] < 0.01


def test_few_images_one_unit_and_nothing_at_all():
    rng = np.random.default_rng(4)
    folds = np.full((10, 4, 3), np.nan)
    folds[:3] = rng.normal(size=(3, 4, 3))
    few = steps_and_units(folds, np.array([1, 1, 1] + [0] * 7))
    assert np.isnan(few["variance_units"]["low"])
    assert -1 <= few["reliability"]["value"] <= 1
    one_image = steps_and_units(folds[:1], np.array([1]))
    assert all(np.isnan(row["value"]) for row in one_image.values())
    one_unit = steps_and_units(*same_in_all_folds(np.arange(4.0)[:, None]))
    assert one_unit["variance_steps"]["value"] == 1
    assert np.isnan(one_unit["reliability"]["p_value"])
    nothing = steps_and_units(*same_in_all_folds(np.zeros((4, 3))))
    assert np.isnan(nothing["variance_both"]["value"])
    assert np.isnan(nothing["reliability"]["value"])


def test_noise_that_a_unit_has_at_all_steps_is_not_reliable():
    rng, below = np.random.default_rng(5), 0
    for seed in range(200):  # no unit differs; half the noise of a fold is the unit's at every step
        folds = rng.normal(size=(10, 12, 4)) + rng.normal(size=(10, 1, 4))
        below += (
            steps_and_units(folds, np.full(10, 8), seed, draws=99)["reliability"]["p_value"] <= 0.05
        )
    assert below <= 22  # 10 are expected, 22 are four standard deviations more
    folds += np.array([0.0, 1.0, 2.0, 3.0])
    assert steps_and_units(folds, np.full(10, 8), draws=99)["reliability"][
        "p_value"
    ] == pytest.approx(0.01)
