"""Importance and masks against sorting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.step_attribution.importance import importance, prune

STEPS = [[0, 1, 3, 4], [2]]  # of the two blocks


def test_importance_against_loops(small):
    layout, halves, weights = small
    g, w = halves[0, :, :24].numpy(), weights[:, :24].numpy()
    expected = {
        "magnitude": [abs(w[b]) for b in (0, 1)],
        "taylor": [abs(w[b] * sum(g[t] for t in STEPS[b])) for b in (0, 1)],
        "stepwise": [sum(abs(w[b] * g[t]) for t in STEPS[b]) for b in (0, 1)],
        "step_max": [np.max([abs(w[b] * g[t]) for t in STEPS[b]], 0) for b in (0, 1)],
        "own_masks": [abs(w[int(t == 2)] * g[t]) for t in range(5)],
        "shifted_masks": [abs(w[int(t == 2)] * g[s]) for t, s in enumerate([1, 3, 2, 4, 0])],
    }
    for method, scores in expected.items():
        found = importance(method, halves[0], weights, layout)
        np.testing.assert_allclose(found, scores, rtol=1e-12)
    with pytest.raises(ValueError, match="no method 'best'"):
        importance("best", halves[0], weights, layout)


def test_random_scores_depend_on_the_seed_alone(small):
    layout, halves, weights = small
    first, again, other = (
        importance("random", terms, weights, layout, seed)
        for terms, seed in ((halves[0], 1), (halves[1], 1), (halves[0], 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 24)


@pytest.mark.parametrize("method", ["taylor", "own_masks"])
def test_the_least_important_are_pruned(small, method):
    """Of both blocks together, or of each step."""
    layout, halves, weights = small
    scores = importance(method, halves[0], weights, layout)
    kept = prune(scores, method, 0.25)
    if method == "own_masks":
        for row, mask in zip(scores.numpy(), kept.numpy(), strict=True):
            assert set(np.flatnonzero(~mask)) == set(row.argsort()[:6])
    else:
        flat, mask = scores.flatten().numpy(), kept.flatten().numpy()
        assert set(np.flatnonzero(~mask)) == set(flat.argsort()[:12])


def test_wrong_shapes_are_refused(small):
    layout, halves, weights = small
    with pytest.raises(TypeCheckError):
        importance("taylor", halves, weights, layout)
    with pytest.raises(TypeCheckError):
        prune(weights[0], "taylor", 0.5)
