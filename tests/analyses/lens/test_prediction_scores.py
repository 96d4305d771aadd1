"""Scores of predictions against loops over images and over pairs of images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.lens.prediction_scores import PredictionScores, sampling_error

CPU = torch.device("cpu")
STEPS, IMAGES, TOKENS, CLASSES = 3, 7, 2, 4


@pytest.fixture
def predictions():
    """Logits of a lens ``(T, B, N, C)``, of the model ``(B, C)``, labels ``(B,)``."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(STEPS, IMAGES, TOKENS, CLASSES, generator=generator)
    final = 2 * torch.randn(IMAGES, CLASSES, generator=generator)
    return logits, final, torch.randint(CLASSES, (IMAGES,), generator=generator)


def different(n):
    return [(i, j) for i, j in itertools.product(range(n), repeat=2) if i != j]


def test_scores_against_loops_over_images_and_pairs(predictions):
    logits, final, labels = predictions
    scores = PredictionScores(STEPS, CLASSES, CPU)
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
        assert float(found["accuracy"]["value"][t]) == pytest.approx(right)
        assert float(found["accuracy"]["null"][t]) == np.bincount(labels).max() / IMAGES
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


def test_a_lens_that_gives_the_final_prediction_diverges_from_others_alone(predictions):
    _, final, labels = predictions
    scores = PredictionScores(1, CLASSES, CPU)
    scores.update(final[None, :, None], final, labels)
    found = scores.compute()
    assert float(found["kl"]["value"]) == pytest.approx(0, abs=1e-12)
    assert float(found["agreement"]["value"]) == 1
    assert float(found["kl"]["null"]) > 0.5


@pytest.mark.parametrize("steps", [1, 2])
def test_a_single_step_has_no_flips(predictions, steps):
    logits, final, labels = predictions
    scores = PredictionScores(steps, CLASSES, CPU)
    scores.update(logits[:steps], final, labels)
    assert scores.compute()["flips"]["value"].isnan().tolist() == [True, False][:steps]


def test_calibrated_predictions_have_about_the_calibration_error_of_the_null():
    """Labels drawn from the predictions themselves, 60 times."""
    generator = torch.Generator().manual_seed(2)
    logits = 1.5 * torch.randn(300, 5, generator=generator)
    errors = []
    for _ in range(60):
        scores = PredictionScores(1, 5, CPU)
        scores.update(
            logits[None, :, None],
            logits,
            torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
        )
        found = scores.compute()["calibration_error"]
        errors.append(float(found["value"]))
    assert np.mean(errors) == pytest.approx(float(found["null"]), rel=0.1)


def test_sampling_error_on_paper():
    """Two bins of 50 and 30 predictions, and an empty one."""
    score = {"bin_n": (50, 0, 30), "bin_confidence": (0.2, math.nan, 0.9)}
    expected = math.sqrt(2 * 50 * 0.2 * 0.8 / math.pi) + math.sqrt(2 * 30 * 0.9 * 0.1 / math.pi)
    assert sampling_error(score) == pytest.approx(expected / 80)


def test_other_shapes_are_refused(predictions):
    logits, final, labels = predictions
    with pytest.raises(TypeCheckError):
        PredictionScores(STEPS, CLASSES, CPU).update(logits, final[1:], labels)
    with pytest.raises(TypeCheckError):
        PredictionScores(STEPS, CLASSES, CPU).update(logits[0], final, labels)
