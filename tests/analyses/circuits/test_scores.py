"""Scores of gates against a loop over images."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.circuits.scores import GateScores
from bvit_interp.errors import UserError


def test_scores_against_a_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(7, 3, generator=generator)
    gated = torch.randn(4, 7, 3, generator=generator)
    labels = torch.randint(3, (7,), generator=generator)
    scores = GateScores(3, [1, 1, 2], torch.device("cpu"))
    scores.update(whole[:5], gated[:, :5], labels[:5])
    scores.update(whole[5:], gated[:, 5:], labels[5:])
    found = scores.compute()
    p = whole.double().softmax(-1)
    kl = torch.stack([(p * (p.log() - v.double().softmax(-1).log())).sum(-1) for v in gated])
    torch.testing.assert_close(
        found["kl"]["value"], torch.stack([kl[0].mean(), kl[1].mean(), kl[2:].mean()])
    )
    differences = kl[2:].mean(0) - kl[0]
    half = 1.959963984540054 * differences.std() / 7**0.5
    assert float(found["excess"]["low"][2]) == pytest.approx(float(differences.mean() - half))
    assert float(found["kl_max"][2]) == pytest.approx(float(kl[2:].mean(1).max()))
    hits = [(v.argmax(-1) == labels).double().mean() for v in gated]
    assert float(found["accuracy"]["value"][2]) == pytest.approx(float(hits[2] + hits[3]) / 2)
    same = (gated[1].argmax(-1) == whole.argmax(-1)).double().mean()
    assert float(found["agreement"]["value"][1]) == pytest.approx(float(same))
    assert float(found["kl_min"][2]) == pytest.approx(float(kl[2:].mean(1).min()))
    assert found["whole"]["n"] == 7


def test_what_cannot_be_scored_is_refused():
    scores = GateScores(3, [1], torch.device("cpu"))
    with pytest.raises(TypeCheckError):
        scores.update(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="logits hold NaN"):
        scores.update(torch.ones(2, 3), torch.full((1, 2, 3), torch.nan), torch.tensor([0, 1]))
