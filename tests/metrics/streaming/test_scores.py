"""Scores against numpy and torchmetrics, in batches of any size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torchmetrics.classification import MulticlassCalibrationError

from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.scores import Classification


def drawn(n, classes, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, classes, generator=generator), torch.randint(
        classes, (n,), generator=generator
    )


def by_hand(logits, labels, bins=15):
    """The scores with one loop over the images and one over the bins, in numpy."""
    hits, top5, losses, confidences = [], [], [], []
    for row, label in zip(logits.double().numpy(), labels.numpy(), strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order = np.argsort(-row)
        hits.append(order[0] == label)
        top5.append(label in order[:5])
        losses.append(-np.log(probabilities[label]))
        confidences.append(probabilities.max())
    hits, confidences, error = np.array(hits), np.array(confidences), 0.0
    for m in range(bins):
        inside = (confidences > m / bins) & (confidences <= (m + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(hits[inside].mean() - confidences[inside].mean())
    return {
        "n": len(labels),
        "accuracy": hits.mean(),
        "top5_accuracy": np.mean(top5),
        "loss": np.mean(losses),
        "confidence": confidences.mean(),
        "calibration_error": error,
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-12, err_msg=key)  # nan equals nan


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 60),
    st.integers(5, 12),
    st.integers(1, 7),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_scores_in_batches_of_any_size_equal_a_loop(n, classes, batch, bins, seed):
    logits, labels = drawn(n, classes, seed)
    metric = Classification(classes, bins)
    for part in range(0, n, batch):
        metric.update(logits[part : part + batch], labels[part : part + batch])
    found = metric.compute()
    assert {key: found[key] for key in by_hand(logits, labels)} == pytest.approx(
        by_hand(logits, labels, bins)
    )


def test_calibration_error_equals_torchmetrics():
    logits, labels = drawn(500, 10)
    metric = Classification(10)
    metric.update(logits, labels)
    theirs = MulticlassCalibrationError(10, n_bins=15, norm="l1")
    theirs.update(logits.softmax(-1), labels)
    assert metric.compute()["calibration_error"] == pytest.approx(float(theirs.compute()), abs=1e-6)
    # random logits are far too sure: the comparison is not of zeros
    assert metric.compute()["calibration_error"] > 0.1


def test_four_images_worked_out_on_paper():
    """Two classes; the logit difference d has confidence 1 / (1 + exp(-d)): 0.9, 0.9, 0.6 and
    0.6."""
    differences = torch.tensor([math.log(9), math.log(9), math.log(1.5), -math.log(1.5)])
    logits = torch.stack([differences, torch.zeros(4)], dim=1)
    metric = Classification(2, bins=5)
    metric.update(logits, torch.tensor([0, 1, 0, 0]))  # right, wrong, right, wrong
    found = metric.compute()
    assert found["accuracy"] == 0.5
    assert found["confidence"] == pytest.approx(0.75)
    assert found["loss"] == pytest.approx(-np.mean(np.log([0.9, 0.1, 0.6, 0.4])))
    assert found["bin_n"] == (0, 0, 2, 0, 2)  # (0.4, 0.6] and (0.8, 1.0]
    assert found["bin_accuracy"][4] == 0.5
    assert found["bin_confidence"][4] == pytest.approx(0.9)
    assert math.isnan(found["bin_accuracy"][0])
    assert found["calibration_error"] == pytest.approx((0.4 + 0.1) / 2)
    assert found["chance"] == 0.75
    assert math.isnan(found["top5_accuracy"])  # no five classes
    assert math.isnan(found["top5_chance"])


def test_the_edges_of_the_confidence_lie_in_a_bin():
    metric = Classification(5, bins=5)
    certain = torch.tensor([[1e4, 0, 0, 0, 0]])
    # confidence 1 and 1 / 5
    metric.update(torch.cat([certain, torch.zeros(1, 5)]), torch.tensor([0, 0]))
    assert metric.compute()["bin_n"] == (1, 0, 0, 0, 1)
    assert metric.compute()["confidence"] == pytest.approx(0.6)


def test_chance_is_the_share_of_the_most_frequent_classes():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6, 5])
    metric = Classification(8)
    for label in labels:
        metric.update(torch.zeros(1, 8), label[None])
    assert metric.compute()["chance"] == 0.3
    assert metric.compute()["top5_chance"] == 0.8  # 3 + 2 + 1 + 1 + 1 of 10


def test_sums_do_not_lose_what_float32_would():
    metric = Classification(5)
    metric.update(torch.zeros(1, 5), torch.tensor([0]))
    metric.loss += 2.0**25  # beside this a float32 would keep nothing below 4
    metric.update(torch.zeros(1, 5), torch.tensor([0]))
    assert metric.compute()["loss"] * 2 - 2.0**25 == pytest.approx(2 * math.log(5), abs=1e-7)


def test_half_precision_logits_and_no_graph():
    logits, labels = drawn(20, 10)
    half, whole = Classification(10), Classification(10)
    half.update(logits.bfloat16().requires_grad_(), labels)
    whole.update(logits.bfloat16().float(), labels)
    assert_equal(half.compute(), whole.compute())
    assert not half.loss.requires_grad


def test_two_processes_add_up_to_one():
    """What a gather does: every state is reduced by a sum, the counts exactly."""
    logits, labels = drawn(31, 10)
    one, first, second = (Classification(10) for _ in range(3))
    one.update(logits, labels)
    first.update(logits[:17], labels[:17])
    second.update(logits[17:], labels[17:])
    for name in one._defaults:
        assert one._reductions[name] is not None, name
        setattr(
            first,
            name,
            one._reductions[name](torch.stack([getattr(first, name), getattr(second, name)])),
        )
    assert_equal(first.compute(), one.compute())
    assert first.bin_n.dtype == first.top5_hits.dtype == torch.int64
    assert first.loss.dtype == torch.float64


def test_reset_begins_again():
    logits, labels = drawn(9, 6)
    metric = Classification(6)
    metric.update(logits, labels)
    metric.reset()
    metric.update(logits[:3], labels[:3])
    assert metric.compute()["n"] == 3


def test_bad_input():
    metric = Classification(4)
    with pytest.raises(UserError, match=r"logits must be \(B, C\) = \(2, 4\), got \(2, 5\)"):
        metric.update(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"labels must be 0\.\.3, got 0\.\.4"):
        metric.update(torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(UserError, match=r"labels must be 0\.\.3, got -1\.\.0"):
        metric.update(torch.zeros(2, 4), torch.tensor([0, -1]))
    with pytest.raises(TypeCheckError):
        metric.update(torch.zeros(2, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(UserError, match="logits hold NaN"):
        metric.update(torch.full((1, 4), torch.nan), torch.tensor([0]))
    with (
        pytest.raises(UserError, match="no image was scored"),
        pytest.warns(UserWarning, match="before"),
    ):
        Classification(4).compute()
