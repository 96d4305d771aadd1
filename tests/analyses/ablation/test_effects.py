"""Ablated runs against whole runs with a hook written by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from bvit_interp.analyses.ablation.effects import METRICS, Ablator
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
        means = {site: total / len(images) for site, total in ablator.clean_sums(images).items()}
        for site, values in means.items():
            expected = torch.stack([found[site, t].mean(0) for t in range(1, last + 1)])
            assert torch.allclose(values.float(), expected, atol=1e-5)
        effects = ablator.with_means(means).effects(images, LABELS, methods, spans, others)
        width = any_model.embed_dim // heads
        order = torch.randperm(heads * width, generator=torch.Generator().manual_seed(5))
        channels = [("z", list(range(h * width, (h + 1) * width))) for h in range(heads)] + [
            ("z", order[:width].tolist())
        ]
        bounds = [
            -(-ablator.probe.num_neurons * g // 3) for g in range(4)
        ]  # three runs of neighbours
        channels += [("mlp_post", list(range(*pair))) for pair in itertools.pairwise(bounds)]
        assert effects.shape == (4, 3, len(channels), len(spans), len(METRICS))
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
        monkeypatch.setattr("bvit_interp.analyses.ablation.effects._BYTES_PER_RUN", 1)
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
        Ablator(tiny, groups=0).empty_means()


def test_means_come_before_mean_ablation_and_donors_before_resample(tiny, images):
    ablator = Ablator(tiny, groups=2)
    for method, lacking in (("mean", "with_means"), ("resample", "donors")):
        with pytest.raises(ValueError, match=lacking), torch.inference_mode():
            ablator.effects(images, LABELS, [method], [(1, 1)])
    means = {site: mean.total for site, mean in ablator.empty_means().items()}
    assert {site: tuple(mean.shape) for site, mean in means.items()} == {
        "z": (12, 17, 4, 8),
        "mlp_post": (12, 17, 128),
    }
    ready = ablator.with_means(means)  # means of zero are zero ablation
    with torch.inference_mode():
        effects = ready.effects(images, LABELS, ["zero", "mean"], [(2, 3)])
    torch.testing.assert_close(effects[:, 0], effects[:, 1], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="means of mlp_post"):
        ablator.with_means({"z": means["z"]})
    with pytest.raises(ValueError, match="means of z must have the shape"):
        ablator.with_means(means | {"z": means["z"][1:]})


def test_the_memory_of_donors_is_that_of_their_activations(tiny, images):
    cache = Probe(tiny).record(images, ["z", "mlp_post"])
    numbers = cache["z"][0].numel() + cache["mlp_post"][0].numel()
    assert Ablator(tiny, groups=1).donor_bytes() == 4 * numbers
    assert Ablator(tiny, groups=0).donor_bytes() == 4 * cache["z"][0].numel()


def test_variants_at_once_fit_in_the_memory_of_a_run(tiny, images, monkeypatch):
    """A variant of four images holds 4 * 17 tokens of four states and the neurons."""
    ablator, batches = Ablator(tiny, groups=0), []
    numbers = 4 * 17 * (4 * 32 + 128)
    monkeypatch.setattr("bvit_interp.analyses.ablation.effects._BYTES_PER_RUN", 3 * 4 * numbers + 5)
    last = ablator.probe.model.blocks[11]
    handle = last.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with torch.inference_mode():
        ablator.effects(images, LABELS, ["zero"], [(3, 12)])
    handle.remove()
    assert batches == [4, 12, 4, 4]  # clean; three heads and one; the null


def test_wrong_shapes_are_refused(tiny, images):
    ablator = Ablator(tiny, groups=0)
    for wrong in ((images[0], LABELS), (images, LABELS[:3]), (images, LABELS.float())):
        with pytest.raises(TypeCheckError):
            ablator.effects(*wrong, ["zero"], [(1, 1)])
    with pytest.raises(TypeCheckError):
        ablator.effects(images, LABELS, ["resample"], [(1, 1)], donors=images[:2])
