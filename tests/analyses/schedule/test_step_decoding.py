"""Decoding of the step against scikit-learn, loops and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from bvit_interp.analyses.schedule.step_decoding import (
    LinearDiscriminant,
    StepMoments,
    StepSums,
    decoding_scores,
    feature,
)
from bvit_interp.errors import UserError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(states):
    """Sums of states ``(n, T, D)``, in two batches."""
    metric = StepMoments(states.shape[1], states.shape[2])
    for part in states.split(len(states) // 2 + 1):
        for t in range(states.shape[1]):
            metric.update(part[:, None, t], t + 1)
    return metric.compute()


def test_the_discriminant_is_scikit_learns():
    states = draw(60, 5, 6) + torch.arange(5)[:, None] * draw(5, 6, seed=3)
    states[:, :, 0] += 3 * states[:, :, 1]
    labels = np.tile(np.arange(1, 6), 60)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(states.reshape(-1, 6).numpy(), labels)
    fresh = draw(40, 5, 6, seed=5) + states.mean(0)
    ours = LinearDiscriminant(moments_of(states), ridge=1e-12)(fresh).argmax(-1) + 1
    np.testing.assert_array_equal(
        ours.flatten().numpy(), theirs.predict(fresh.reshape(-1, 6).numpy())
    )


def test_decoding_scores_against_a_loop():
    scores = draw(2, 3, 4, 4)
    found = decoding_scores(scores)
    for b in range(2):
        right, error, pairs = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
        for k in range(3):
            s = scores[b, k].numpy()
            for t in range(4):
                right[k, t] = s[t].argmax() == t
                error[k, t] = abs(s[t].argmax() - t)
                pairs[k, t] = np.mean(
                    [s[t, t] + s[u, u] > s[t, u] + s[u, t] for u in range(4) if u != t]
                )
        for j, values in enumerate((right, error, pairs)):
            np.testing.assert_allclose(found[b, :4, j], values.mean(0))
            np.testing.assert_allclose(found[b, 4, j], values.mean())


def test_steps_of_equal_means_are_not_told_apart_by_forced_choice():
    """Steps that differ in spread alone: the argmax may use the spread, the forced choice
    cannot."""
    spread = torch.linspace(1, 6, 4)[:, None]
    fit, fresh = draw(400, 4, 5) * spread, draw(2000, 4, 5, seed=9) * spread
    score = decoding_scores(LinearDiscriminant(moments_of(fit), 1e-3)(fresh)[:, None])[:, -1].mean(
        0
    )
    assert score[2] == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_and_nan_are_refused():
    with pytest.raises(UserError, match="no image is left"):
        StepMoments(2, 3).compute()
    with pytest.raises(UserError, match="NaN"):
        StepMoments(2, 3).update(torch.full((1, 1, 3), math.nan, dtype=torch.float64), 1)


def test_the_ridge_is_a_share_of_the_mean_variance():
    """One direction of variance 4 and one of 1; the means lie at -1 and 1 in both."""
    noise = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]]).double()
    means = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    states = noise[:, None] + means
    found = LinearDiscriminant(moments_of(states), ridge=0.5)
    diagonal = torch.tensor([4.0, 1.0], dtype=torch.float64) + 0.5 * 2.5
    torch.testing.assert_close(found.weight, (means / diagonal).T)
    torch.testing.assert_close(found.bias, -(means**2 / diagonal).sum(1) / 2)


def test_features_by_hand():
    tokens = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(feature(tokens, "raw"), tokens.double())
    direction = feature(tokens, "direction")
    torch.testing.assert_close(direction[0], torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert direction[1].tolist() == [0, 0]
    norm = feature(tokens, "norm")
    assert norm.shape == (2, 1)
    assert norm[0].item() == pytest.approx(math.log(5))
    assert norm.isfinite().all()


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        decoding_scores(draw(2, 3, 4, 5))
    with pytest.raises(TypeCheckError):
        StepSums(draw(3, 3), draw(2, 3), draw(3))
    with pytest.raises(TypeCheckError):
        StepSums(draw(3, 3), draw(2, 4), draw(2))


def test_a_tie_is_not_told_apart():
    found = decoding_scores(torch.zeros(1, 1, 3, 3, dtype=torch.float64))[0]
    assert found[:, 2].tolist() == [0, 0, 0, 0]


def test_without_variance_the_ridge_has_the_scale_of_the_states():
    means = draw(3, 4)
    found = LinearDiscriminant(moments_of(means.expand(4, 3, 4)), 0.1)
    scaled = LinearDiscriminant(moments_of((1e3 * means).expand(4, 3, 4)), 0.1)
    assert found(means).argmax(-1).tolist() == [0, 1, 2]
    # only rounding is left of the covariance, 1e-16 of the squares beside a ridge of 1e-13
    torch.testing.assert_close(1e3 * scaled.weight, found.weight, rtol=0.05, atol=0)
