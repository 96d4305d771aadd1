"""Scores of lenses against loops over images, over pairs of images and over thresholds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bvit_interp.analyses.lens.scores import CrossPairs, LensScores, MapScores, leave

CPU = torch.device("cpu")
STEPS, IMAGES, TOKENS, CLASSES = 3, 7, 2, 4


@pytest.fixture
def answers():
    """Logits of a lens ``(T, B, N, C)``, of the model ``(B, C)``, labels ``(B,)``."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(STEPS, IMAGES, TOKENS, CLASSES, generator=generator)
    final = 2 * torch.randn(IMAGES, CLASSES, generator=generator)
    return logits, final, torch.randint(CLASSES, (IMAGES,), generator=generator)


def different(n):
    return [(i, j) for i, j in itertools.product(range(n), repeat=2) if i != j]


def test_cross_pairs_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(6, 5, generator=generator), torch.randn(6, 2, 5, generator=generator)
    metric = CrossPairs(2, 5)
    for rows in (slice(0, 4), slice(4, 6)):
        metric.update(one[rows], other[rows])
    found = metric.compute()
    for t in range(2):
        same = [float(one[i] @ other[i, t]) for i in range(6)]
        between = [float(one[i] @ other[j, t]) for i, j in different(6)]
        assert found["same_image"][t].item() == pytest.approx(np.mean(same), rel=1e-5)
        assert found["other_images"][t].item() == pytest.approx(np.mean(between), rel=1e-5)


def test_one_image_has_no_other():
    metric = CrossPairs(1, 3)
    metric.update(torch.ones(1, 3), torch.ones(1, 1, 3))
    assert metric.compute()["same_image"].item() == 3
    assert math.isnan(metric.compute()["other_images"].item())


def test_scores_against_loops_over_images_and_pairs(answers):
    logits, final, labels = answers
    scores = LensScores(STEPS, CLASSES, CPU)
    for rows in (slice(0, 2), slice(2, 7)):
        scores.update(logits[:, rows], final[rows], labels[rows])
    found = scores.compute()
    p, q = final.double().softmax(-1).numpy(), logits.double().softmax(-1).numpy()

    def kl(i, j, t):
        return np.mean([(p[i] * np.log(p[i] / q[t, j, n])).sum() for n in range(TOKENS)])

    def agrees(i, j, t):
        return np.mean([p[i].argmax() == q[t, j, n].argmax() for n in range(TOKENS)])

    for t in range(STEPS):
        for name, of_pair in (("kl", kl), ("agreement", agrees)):
            own = [of_pair(i, i, t) for i in range(IMAGES)]
            half = 1.959963984540054 * np.std(own, ddof=1) / math.sqrt(IMAGES)
            measured = {key: float(values[t]) for key, values in found[name].items()}
            assert measured["value"] == pytest.approx(np.mean(own), rel=1e-6), name
            assert measured["high"] - measured["value"] == pytest.approx(half, rel=1e-6)
            assert measured["null"] == pytest.approx(
                np.mean([of_pair(i, j, t) for i, j in different(IMAGES)]), rel=1e-6
            )
            assert measured["n"] == IMAGES
        right = (q[t].argmax(-1) == labels.numpy()[:, None]).mean()
        assert float(found["top1"]["value"][t]) == pytest.approx(right)
        assert float(found["top1"]["null"][t]) == np.bincount(labels).max() / IMAGES
        assert float(found["confidence"]["value"][t]) == pytest.approx(q[t].max(-1).mean())
        assert float(found["entropy"]["value"][t]) == pytest.approx(
            -(q[t] * np.log(q[t])).sum(-1).mean()
        )
        assert float(found["entropy"]["null"][t]) == pytest.approx(math.log(4))
        own = np.take_along_axis(q[t], labels.numpy()[:, None, None], -1)
        assert float(found["true_rank"]["value"][t]) == pytest.approx(
            1 + (q[t] > own).sum(-1).mean()
        )
        assert float(found["true_rank"]["null"][t]) == 2.5
    flips = (q[1:].argmax(-1) != q[:-1].argmax(-1)).mean((1, 2))
    np.testing.assert_allclose(found["flips"]["value"][1:], flips)
    shares = [
        np.bincount(q[t].argmax(-1).ravel(), minlength=4) / (IMAGES * TOKENS) for t in range(STEPS)
    ]
    assert float(found["flips"]["null"][2]) == pytest.approx(1 - shares[1] @ shares[2])
    assert math.isnan(found["flips"]["value"][0])


def test_a_lens_that_gives_the_final_answer_diverges_from_others_alone(answers):
    _, final, labels = answers
    scores = LensScores(1, CLASSES, CPU)
    scores.update(final[None, :, None], final, labels)
    found = scores.compute()
    assert float(found["kl"]["value"]) == pytest.approx(0, abs=1e-12)
    assert float(found["agreement"]["value"]) == 1
    assert float(found["kl"]["null"]) > 0.5


@pytest.mark.parametrize("steps", [1, 2])
def test_a_single_step_has_no_flips(answers, steps):
    logits, final, labels = answers
    scores = LensScores(steps, CLASSES, CPU)
    scores.update(logits[:steps], final, labels)
    assert scores.compute()["flips"]["value"].isnan().tolist() == [True, False][:steps]


def test_calibrated_answers_have_about_the_calibration_error_of_the_null():
    """Labels drawn from the answers themselves, 60 times."""
    generator = torch.Generator().manual_seed(2)
    logits = 1.5 * torch.randn(300, 5, generator=generator)
    errors = []
    for _ in range(60):
        scores = LensScores(1, 5, CPU)
        scores.update(
            logits[None, :, None],
            logits,
            torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
        )
        found = scores.compute()["calibration_error"]
        errors.append(float(found["value"]))
    assert np.mean(errors) == pytest.approx(float(found["null"]), rel=0.1)


# ---- maps ----------------------------------------------------------------------------------------------


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
    np.testing.assert_allclose(scores.mean.compute()["value"], own.mean(0), rtol=1e-6)

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


# ---- leaving -------------------------------------------------------------------------------------------


def test_leaving_against_a_loop():
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(size=(40, 5)), (rng.uniform(size=(40, 5)) < 0.6).astype(float)
    for threshold in (0.0, 0.3, 0.7, 1.0):
        steps = []
        for row in confidence:
            steps.append(next((t for t in range(4) if row[t] > threshold), 4))
        found = leave(confidence, right, threshold)
        assert found["value"] == pytest.approx(np.mean([right[i, t] for i, t in enumerate(steps)]))
        assert found["mean_step"] == pytest.approx(np.mean(steps) + 1)
        # drawn at random: each step of departure meets every image
        assert found["null"] == pytest.approx(np.mean([right[:, t].mean() for t in steps]))
        assert found["low"] < found["value"] < found["high"]
    assert leave(confidence, right, 1.0)["value"] == right[:, -1].mean()
    assert leave(confidence, right, 0.0)["mean_step"] == 1
