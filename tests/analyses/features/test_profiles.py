"""Profiles against numpy on all the data at once, and against Probe's whole activations."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch

from bvit_interp.analyses.features.profiles import ResponseProfiles, responses, select_neurons
from bvit_interp.errors import UserError
from bvit_interp.probes.probe import Probe


def test_responses_are_the_probes(any_model, images):
    probe = Probe(any_model)
    means, peaks = responses(probe, images)
    with torch.no_grad():
        patches = probe.record(images, "mlp_post", tokens="patches")["mlp_post"]  # (B, T, P, F)
    assert torch.allclose(means, patches.mean(2), atol=1e-6)
    assert torch.equal(peaks, patches.argmax(2))


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_spread_and_correlation_against_numpy(batch):
    rng = np.random.default_rng(0)
    values = 100 + rng.normal(size=(50, 4, 3)).cumsum(1)  # steps that go together, far from zero
    values[:, :, 2] = 5.1  # a silent neuron
    whole, shards = ResponseProfiles(4, 3), [ResponseProfiles(4, 3), ResponseProfiles(4, 3)]
    for i, first in enumerate(range(0, 50, batch)):
        part = torch.from_numpy(values[first : first + batch])
        whole.update(part)
        shards[i % 2].update(part)
    shards[0].merge_state(shards[1])
    for metric in (whole, shards[0]):
        found = metric.compute()
        assert found["count"] == 50
        np.testing.assert_allclose(found["spread"][:, :2], values[:, :, :2].std(0), rtol=1e-8)
        for t, f in np.ndindex(3, 2):
            expected = np.corrcoef(values[:, t, f], values[:, t + 1, f])[0, 1]
            np.testing.assert_allclose(found["correlation"][t, f], expected, rtol=1e-7)
        assert not found["spread"][:, 2].any()
        assert found["correlation"][:, 2].isnan().all()


def test_change_and_who_is_chosen():
    """Neuron f follows its first step with noise that grows with f; neuron 6 is silent at one
    step."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(400, 1, 7))
    values = first + np.arange(7) / 4 * rng.normal(size=(400, 3, 7))
    values[:, 1, 6] = 1e-3 * values[:, 0, 6]
    metric = ResponseProfiles(3, 7)
    metric.update(torch.from_numpy(values))
    profile = metric.compute()
    expected = [
        1 - np.mean([np.corrcoef(values[:, t, f], values[:, t + 1, f])[0, 1] for t in range(2)])
        for f in range(7)
    ]
    np.testing.assert_allclose(profile["correlation_distance"], expected, atol=1e-9)
    assert select_neurons(profile, 3) == [0, 2, 5]
    assert select_neurons(profile, 1) == [3]
    assert select_neurons(profile, 6) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(
        UserError, match="6 neurons respond differently to different images at every step, not 7"
    ):
        select_neurons(profile, 7)


def test_nan_is_an_error():
    with pytest.raises(UserError, match="NaN or infinite"):
        ResponseProfiles(2, 1).update(torch.full((1, 2, 1), torch.nan))


def test_wrong_shapes_are_refused(tiny, images):
    with pytest.raises(jaxtyping.TypeCheckError):
        ResponseProfiles(2, 1).update(torch.zeros(4, 2))
    with pytest.raises(jaxtyping.TypeCheckError):
        responses(Probe(tiny), images[0])
