"""Who leaves where, on paper and against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.metrics.exits import exit_positions, is_confident, random_exit_accuracy


def test_who_leaves_where_on_paper():
    confidence = np.array([[0.9, 0.2, 0.1], [0.5, 0.6, 0.1], [0.1, 0.2, 0.3]])
    before = confidence.copy()
    assert exit_positions(confidence, 0.5).tolist() == [0, 1, 2]  # 0.5 does not exceed 0.5
    assert exit_positions(confidence, 0.0).tolist() == [0, 0, 0]
    assert exit_positions(confidence, 1.0).tolist() == [2, 2, 2]
    assert (confidence == before).all()


def test_against_a_loop_over_images():
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(size=(40, 5)), rng.uniform(size=(40, 5)) < 0.6
    for threshold in (0.0, 0.3, 0.7, 1.0):
        expected = [next((e for e in range(4) if row[e] > threshold), 4) for row in confidence]
        positions = exit_positions(confidence, threshold)
        assert positions.tolist() == expected
        # drawn at random: each position meets every image
        null = np.mean([right[:, e].mean() for e in expected])
        assert random_exit_accuracy(right, positions) == pytest.approx(null)


def test_tensors_follow_the_same_rule():
    assert is_confident(torch.tensor([0.2, 0.5, 0.7]), 0.5).tolist() == [False, False, True]


def test_other_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        exit_positions(np.zeros(3), 0.5)
    with pytest.raises(TypeCheckError):
        random_exit_accuracy(np.zeros((3, 2)), np.zeros(4, dtype=int))
