"""Ablation: every variant against a run of its own with an edit written by hand."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.errors import UserError
from bvit_interp.models.stepping import advance, answer, embed, proceed
from bvit_interp.probes.ablate import SiteMeans, ablate, neuron_groups, site_sums
from bvit_interp.probes.probe import Probe
from bvit_interp.vocabulary import Address


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
@pytest.mark.parametrize("site", ["z", "mlp_post"])
def test_variants_of_a_restarted_batch_are_runs_of_their_own(any_model, images, site, kind):
    probe = Probe(any_model)
    step, units = 3, {"z": probe.num_heads, "mlp_post": probe.num_neurons}[site]
    keep = torch.rand(3, units, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.inference_mode():
        clean = probe.record(images, site, step)[site, step]
        fill = {"zero": None, "mean": clean.mean(0), "resample": clean.roll(1, 0)}[kind]
        before = proceed(probe.model, embed(probe.model, images), step - 1)
        with probe.edit({(site, step): ablate(keep, fill)}):
            after = advance(probe.model, before.repeated(3))
        logits = answer(probe.model, proceed(probe.model, after)).unflatten(0, (3, -1))
        for variant, kept in enumerate(keep):

            def by_hand(activation, address, kept=kept):
                new = activation.clone()
                for unit in range(units):
                    if not kept[unit]:
                        new[:, :, unit] = (
                            0
                            if fill is None
                            else fill[:, unit]
                            if kind == "mean"
                            else fill[:, :, unit]
                        )
                return new

            with probe.edit({(site, step): by_hand}):
                expected = probe(images)
            assert torch.allclose(logits[variant], expected, atol=1e-4)
        assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def test_shares_between_0_and_1_interpolate():
    """Two variants of two images, one token, two neurons: 0.25 of 8 and 0.75 of 4 are 5."""
    keep = torch.tensor([[0.25, 1.0], [0.0, 0.5]])
    activation = torch.tensor([8.0, 2.0]).expand(4, 1, 2)
    filled = ablate(keep, torch.tensor([[4.0, 6.0]]))(activation, Address("mlp_post", 1))
    assert filled[:, 0].tolist() == [[5.0, 2.0], [5.0, 2.0], [4.0, 4.0], [4.0, 4.0]]
    zeroed = ablate(keep)(activation, Address("mlp_post", 1))
    assert zeroed[:, 0].tolist() == [[2.0, 2.0], [2.0, 2.0], [0.0, 1.0], [0.0, 1.0]]


def test_keeping_all_changes_nothing(tiny, images):
    probe = Probe(tiny)
    with torch.inference_mode():
        with probe.edit({("z", 5): ablate(torch.ones(1, 4, dtype=torch.bool))}):
            kept = probe(images)
        assert torch.equal(kept, tiny(images))


def test_a_gradient_goes_through_the_shares(tiny, images):
    probe = Probe(tiny)
    share = torch.ones(1, 4, requires_grad=True)
    with probe.edit({("z", 5): ablate(share)}):
        probe(images).sum().backward()
    assert share.grad.shape == (1, 4)
    assert share.grad.abs().min() > 0


def test_neuron_groups_are_runs_of_equal_size():
    assert neuron_groups(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert neuron_groups(8, 4).bincount().tolist() == [2, 2, 2, 2]


def test_means_add_up_over_batches_and_start_in_shape():
    metric = SiteMeans(2, 3)
    assert metric.total.shape == (2, 3)  # of a process without images, too
    metric.update(torch.ones(2, 3), 1)
    metric.update(torch.full((2, 3), 8.0), 2)
    assert torch.equal(metric.compute(), torch.full((2, 3), 3.0, dtype=torch.float64))
    with pytest.raises(UserError, match="NaN"):
        metric.update(torch.full((2, 3), torch.nan), 3)
    with pytest.raises(ValueError, match="shape"):
        metric.update(torch.ones(1, 3), 1)  # it would broadcast


def test_sums_of_sites_are_those_of_recorded_activations(any_model, images):
    probe = Probe(any_model)
    sums = site_sums(probe, images)
    assert list(sums) == ["z", "mlp_post"]
    cache = probe.record(images, list(sums))
    for site, total in sums.items():
        assert total.dtype == torch.float64
        torch.testing.assert_close(total, cache[site].double().sum(0), rtol=1e-5, atol=1e-6)
    assert list(site_sums(probe, images, ["resid_mid"])) == ["resid_mid"]


def test_wrong_shapes_are_refused(tiny, images):
    with pytest.raises(TypeCheckError):
        ablate(torch.ones(4))  # an axis of variants is missing
    with pytest.raises(TypeCheckError):
        site_sums(Probe(tiny), images[0])
