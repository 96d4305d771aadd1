"""Responses of units against what the probe records, and sums against loops."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.selectivity.responses import (
    ClassSums,
    ResponseStatistics,
    unit_responses,
)
from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe

SITES = ("mlp_post", "z")


def test_responses_are_what_the_probe_records(any_model, images):
    probe = Probe(any_model)
    with torch.no_grad():
        _, cache = probe.run(images, SITES, range(1, probe.num_steps + 1))
        seen = unit_responses(probe, images)
    for site in SITES:
        whole = cache[site]
        strength = whole if site == "mlp_post" else whole.square().sum(-1).sqrt()
        patches = strength[:, :, probe.num_prefix_tokens :]
        assert torch.allclose(seen[site].values, patches.mean(2), atol=1e-5)
        assert torch.equal(seen[site].patches, patches.argmax(2))
        assert torch.allclose(seen[site].sums, whole.double().sum(0), atol=1e-5)
    neurons = cache["mlp_post"][:, :, probe.num_prefix_tokens :]
    assert torch.allclose(seen["mlp_post"].firing, (neurons > 0).float().mean(2))
    assert seen["z"].firing is None


def test_class_sums_against_a_loop():
    values = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    labels, halves, groups = torch.arange(9) % 4, torch.arange(9) % 2, torch.arange(9) % 3
    metric = ClassSums(5, 2, 3)
    for part in (slice(0, 4), slice(4, 9)):
        metric.update(values[part], labels[part], halves[part], groups[part])
    found = metric.compute()
    for half in (0, 1):
        for c in range(5):
            chosen = (labels == c) & (halves == half)
            assert torch.allclose(found["total"][half, c], values[chosen].double().sum(0))
            assert found["count"][half, c] == chosen.sum()
    for group in range(5):
        assert torch.allclose(found["total"][2, group], values[groups == group].double().sum(0))
        assert found["count"][2, group] == (groups == group).sum()
    assert torch.allclose(found["squares"], values.double().square().sum(0))
    with pytest.raises(UserError, match="NaN"):
        metric.update(values * torch.nan, labels, halves, groups)


def test_statistics_of_two_batches_are_those_of_both(tiny_reg4, images):
    """Each image is its own class, so that the sums by class are the responses."""
    probe = Probe(tiny_reg4)
    count = len(images)
    statistics = ResponseStatistics(probe, classes=count, n_top=2)
    labels, positions = torch.arange(count), 7 + 3 * torch.arange(count)
    halves = torch.zeros(count, dtype=torch.int64)
    with torch.no_grad():
        whole = unit_responses(probe, images)
        for rows in (slice(0, 1), slice(1, None)):
            seen = unit_responses(probe, images[rows])
            statistics.update(seen, labels[rows], halves[rows], labels[rows], positions[rows])
    for site in SITES:
        sums = statistics.class_sums[site].compute()
        torch.testing.assert_close(sums["total"][0], whole[site].values.double())
        torch.testing.assert_close(sums["total"][2], whole[site].values.double())
        means = statistics.site_means[site].compute()
        torch.testing.assert_close(means, whole[site].sums / count)
        top = statistics.top_images[site].compute()
        first = whole[site].values.argmax(0)
        assert torch.equal(top["images"][..., 0], positions[first])
        patches = whole[site].patches.gather(0, first[None])[0]
        assert torch.equal(top["patches"][..., 0], patches)
    firing = statistics.firing.compute()["value"]
    torch.testing.assert_close(firing, whole["mlp_post"].firing.double().mean(0))


def test_wrong_shapes_are_refused(tiny, images):
    probe = Probe(tiny)
    with pytest.raises(TypeCheckError):
        unit_responses(probe, images[0])
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeCheckError):
        ClassSums(2, 4, 5).update(torch.zeros(2, 4, 5), labels, labels, labels)
