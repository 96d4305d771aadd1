"""Scores of gates against a loop over images, and intervals over draws that were planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import stats

from bvit_interp.analyses.circuits.scores import GateScores, over_draws
from bvit_interp.errors import UserError


def test_scores_against_a_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 3, generator=generator)
    gated = torch.randn(9, 7, 3, generator=generator)
    labels = torch.randint(3, (7,), generator=generator)
    variants = {"per-step": 1, "even": 1, "shuffled": 3, "random": 4}
    scores = GateScores(3, variants, torch.device("cpu"))
    scores.update(whole[:5], gated[:, :5], labels[:5])
    scores.update(whole[5:], gated[:, 5:], labels[5:])
    found = scores.compute()
    p = whole.double().softmax(-1)
    kl = torch.stack([(p * (p.log() - v.double().softmax(-1).log())).sum(-1) for v in gated])
    right = torch.stack([(v.argmax(-1) == labels).double() for v in gated])
    same = torch.stack([(v.argmax(-1) == whole.argmax(-1)).double() for v in gated])
    values = {"kl": kl, "excess": kl - kl[0], "accuracy": right, "agreement": same}
    for measure, table in values.items():
        for condition, row in (("per-step", 0), ("even", 1)):  # over images alone
            half = 1.959963984540054 * table[row].std() / 7**0.5
            expected = [table[row].mean(), table[row].mean() - half, table[row].mean() + half]
            score = found["conditions"][condition][measure]
            assert list(score.values()) == pytest.approx([float(each) for each in expected])
        for condition, drawn in (("shuffled", table[2:5]), ("random", table[5:])):
            for draw, own in enumerate(drawn):
                score = found["draws"][condition][draw][measure]
                half = 1.959963984540054 * own.std() / 7**0.5
                assert score["value"] == pytest.approx(float(own.mean()))
                assert score["high"] == pytest.approx(float(own.mean() + half))
            count = len(drawn)
            a, b = float(drawn.mean(1).var() / count), float(drawn.mean(0).var() / 7)
            half = stats.t.ppf(0.975, count - 1) * (a + b) ** 0.5
            score = found["conditions"][condition][measure]
            mean = float(drawn.mean())
            assert list(score.values()) == pytest.approx([mean, mean - half, mean + half])
    assert set(found["draws"]) == {"shuffled", "random"}
    assert found["whole"]["n"] == 7


def test_draws_that_differ_widely_have_a_wide_interval():
    """Each draw gives the same logits on all images: no spread over images, all of it over
    draws."""
    whole = torch.zeros(5, 2)
    tilts = torch.tensor([0.0, 0.5, 1.0, 4.0])
    gated = torch.stack(
        [torch.stack([tilt, -tilt]).expand(5, 2) for tilt in (0 * tilts[0], *tilts)]
    )
    scores = GateScores(2, {"per-step": 1, "random": 4}, torch.device("cpu"))
    scores.update(whole, gated, torch.zeros(5, dtype=torch.int64))
    score = scores.compute()["conditions"]["random"]["kl"]
    each = np.log(np.cosh(tilts.double().numpy()))  # KL from (1/2, 1/2)
    half = stats.t.ppf(0.975, 3) * each.std(ddof=1) / 2
    expected = [each.mean(), each.mean() - half, each.mean() + half]
    assert list(score.values()) == pytest.approx(expected)
    assert score["high"] - score["low"] > 4


@pytest.mark.parametrize(("count", "spread"), [(3, 1.0), (8, 1.0), (8, 0.1)])
def test_the_interval_covers_the_planted_mean(count, spread):
    """Of draws and images with variances that are known, at least 95 % of the intervals hold the
    truth; of those over images alone, far fewer."""
    rng, n, repeats = np.random.default_rng(0), 40, 400
    covered, narrow = 0, 0
    for _ in range(repeats):
        table = (
            spread * rng.normal(size=(count, 1))
            + 0.5 * rng.normal(size=(1, n))
            + 0.5 * rng.normal(size=(count, n))
        )
        means = table.mean(0)
        half = 1.96 * means.std(ddof=1) / n**0.5
        images = {"value": means.mean(), "low": means.mean() - half, "high": means.mean() + half}
        found = over_draws(images, table.mean(1).tolist(), n)
        covered += found["low"] < 0 < found["high"]
        narrow += images["low"] < 0 < images["high"]
    assert covered / repeats >= 0.93
    if spread == 1.0:
        assert narrow / repeats < 0.5
        assert covered / repeats <= 0.98  # nor is it merely wide


def test_few_draws_or_images_have_no_interval():
    images = {"value": 2.0, "low": 1.0, "high": 3.0}
    for draws, n in (([1.0, 3.0], 9), ([2.0], 9), ([1.0, 2.0, 3.0], 1)):
        found = over_draws(images, draws, n)
        assert found["value"] == 2.0
        assert np.isnan([found["low"], found["high"]]).all()
    assert over_draws(images, [1.0, 2.0, 3.0], 9)["low"] < 1.0
    same = {"value": 2.0, "low": 2.0, "high": 2.0}
    assert over_draws(same, [2.0, 2.0, 2.0], 9) == same


def test_what_cannot_be_scored_is_refused():
    scores = GateScores(3, {"per-step": 1}, torch.device("cpu"))
    with pytest.raises(TypeCheckError):
        scores.update(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="logits hold NaN"):
        scores.update(torch.ones(2, 3), torch.full((1, 2, 3), torch.nan), torch.tensor([0, 1]))
