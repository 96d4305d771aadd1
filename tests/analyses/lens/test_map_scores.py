"""Scores of maps against loops over images and pairs of images, and on paper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.lens.map_scores import MapScores

CPU = torch.device("cpu")
STEPS, CLASSES = 3, 4


def different(n):
    return [(i, j) for i, j in itertools.product(range(n), repeat=2) if i != j]


def test_maps_against_loops():
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(STEPS, 5, 6, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (5,), generator=generator)
    scores = MapScores(STEPS, 6, False, CPU)
    maps = torch.cat(
        [scores.update(logits[:, rows], labels[rows]) for rows in (slice(0, 3), slice(3, 5))]
    )
    log_q = logits.double().log_softmax(-1).numpy()
    own = np.stack([[log_q[t, i, :, labels[i]] for t in range(STEPS)] for i in range(5)])
    np.testing.assert_allclose(maps, own, rtol=1e-6)
    found = scores.compute()
    assert set(found) == {"map_entropy", "map_correlation"}
    np.testing.assert_allclose(scores.mean_maps(), own.mean(0), rtol=1e-6)

    def entropy(map_):
        shares = np.exp(map_) / np.exp(map_).sum()
        return -(shares * np.log(shares)).sum()

    for t in range(STEPS):
        true = np.mean([entropy(own[i, t]) for i in range(5)])
        rest = [
            entropy(log_q[t, i, :, c]) for i in range(5) for c in range(CLASSES) if c != labels[i]
        ]
        assert float(found["map_entropy"]["value"][t]) == pytest.approx(true)
        assert float(found["map_entropy"]["null"][t]) == pytest.approx(np.mean(rest))
        same = np.mean([np.corrcoef(own[i, t], own[i, -1])[0, 1] for i in range(5)])
        others = np.mean([np.corrcoef(own[i, t], own[j, -1])[0, 1] for i, j in different(5)])
        assert float(found["map_correlation"]["value"][t]) == pytest.approx(same)
        assert float(found["map_correlation"]["null"][t]) == pytest.approx(others)


def test_pointing_worked_out_on_paper():
    """Four patches, two classes; the largest logit of the true class points."""
    logits = torch.zeros(1, 3, 4, 2)
    logits[0, 0, 1, 0] = 3.0  # image 0 points at patch 1
    logits[0, 1, 2, 1] = 3.0  # image 1 at patch 2
    logits[0, 2, 0, 0] = 3.0  # image 2 shows no object: left out
    positive = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    ignored = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    scores = MapScores(1, 4, True, CPU)
    scores.update(logits, torch.tensor([0, 1, 0]), (positive, ignored))
    found = scores.compute()
    assert float(found["pointing"]["value"]) == 0.5  # image 0 hits, image 1 does not
    assert int(found["pointing"]["n"]) == 2
    # image 0's point in image 1's mask: a hit; image 1's in image 0's: none
    assert float(found["pointing"]["null"]) == 0.5
    assert float(found["object_share"]["value"]) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert int(found["map_entropy"]["n"]) == 3


def test_tied_maps_share_the_point():
    scores = MapScores(1, 4, True, CPU)
    positive = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    scores.update(
        torch.zeros(1, 2, 4, 3), torch.tensor([0, 1]), (positive, torch.zeros_like(positive))
    )
    found = scores.compute()
    assert float(found["pointing"]["value"]) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert float(found["pointing"]["null"]) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert math.isnan(
        float(found["map_correlation"]["value"])
    )  # a map that does not vary is like none


def test_a_single_step():
    scores = MapScores(1, 4, False, CPU)
    scores.update(torch.randn(1, 3, 4, 5), torch.tensor([0, 1, 4]))
    found = scores.compute()
    assert scores.mean_maps().shape == (1, 4)
    assert float(found["map_correlation"]["value"][0]) == pytest.approx(1)  # with itself
    assert found["map_entropy"]["null"].shape == (1,)


def test_other_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        MapScores(1, 4, False, CPU).update(torch.zeros(1, 3, 4, 5), torch.tensor([0, 1]))
