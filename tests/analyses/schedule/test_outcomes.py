"""Outcomes of changed runs against a loop over images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.schedule.outcomes import Outcomes
from bvit_interp.errors import UserError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_outcomes_against_a_loop_over_images():
    logits, labels = draw(3, 20, 4), torch.arange(20) % 3
    normal = logits[1] + 0.5 * draw(20, 4, seed=1)
    metric = Outcomes(3, 4)
    for part in (slice(0, 13), slice(13, 20)):
        metric.update(logits[:, part], normal[part], labels[part])
    found = metric.compute()
    for k in range(3):
        hits, usual, same, change = [], [], [], []
        for own, other, label in zip(
            logits[k].numpy(), normal.numpy(), labels.tolist(), strict=True
        ):
            hits.append(own.argmax() == label)
            usual.append(other.argmax() == label)
            same.append(own.argmax() == other.argmax())
            change.append(
                own[label] - np.log(np.exp(own).sum()) - other[label] + np.log(np.exp(other).sum())
            )
        assert found["accuracy"][k]["value"] == np.mean(hits)
        assert found["accuracy"][k]["null"] == 7 / 20
        assert found["agreement"][k]["value"] == np.mean(same)
        paired = np.subtract(hits, usual, dtype=float)
        for name, values in (("accuracy_change", paired), ("log_prob_change", np.array(change))):
            assert found[name][k]["value"] == pytest.approx(values.mean())
            half = 1.959964 * values.std(ddof=1) / math.sqrt(20)
            assert found[name][k]["high"] - found[name][k]["value"] == pytest.approx(half, rel=1e-5)
            assert "null" not in found[name][k]
        shares = [
            np.bincount(of.argmax(-1), minlength=4) / 20
            for of in (logits[k].numpy(), normal.numpy())
        ]
        assert found["agreement"][k]["null"] == pytest.approx(shares[0] @ shares[1])
    n, p, z = 20, found["accuracy"][0]["value"], 1.959964
    low = (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (
        1 + z * z / n
    )
    assert found["accuracy"][0]["low"] == pytest.approx(low, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_outcomes_refuse_nan_and_nothing():
    with pytest.raises(UserError, match="no image was scored"):
        Outcomes(2, 3).compute()
    with pytest.raises(UserError, match="NaN"):
        Outcomes(1, 3).update(
            torch.full((1, 2, 3), math.nan), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
        )


def test_wrong_shapes_are_refused():
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeCheckError):
        Outcomes(2, 3).update(torch.zeros(2, 4, 3), torch.zeros(3, 3), labels)
    with pytest.raises(TypeCheckError):
        Outcomes(2, 3).update(torch.zeros(2, 4, 3), torch.zeros(4, 3), labels[:-1])
