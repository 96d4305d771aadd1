"""Predictions along the steps, worked out on paper and in batches of any size."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.predictions import StepPredictions


def logits_of(predictions, classes=4, sure=3.0):
    """Logits ``(T, B, C)`` whose largest is at the given class."""
    return sure * torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def test_worked_out_on_paper():
    metric = StepPredictions(steps=3, num_classes=4, reference=3)
    metric.update(logits_of([[0, 1], [0, 2], [3, 2]]), torch.tensor([0, 2]))
    found = metric.compute()
    assert found["flips"][1:].tolist() == [0.5, 0.5]
    assert found["agreement"].tolist() == [0.0, 0.5, 1.0]
    # step 1: image 1 right (rank 1); image 2: one above, three tied at 0 -> ranks 2, 3, 4 -> 3
    assert found["true_rank"].tolist() == [2.0, 1.0, 2.0]
    # p_1 = (1/2, 1/2, 0, 0), p_2 = (1/2, 0, 1/2, 0), p_3 = (0, 0, 1/2, 1/2)
    assert found["flips_null"][1:].tolist() == [0.75, 0.75]
    p = torch.tensor([3.0, 0, 0, 0]).double().softmax(-1)
    assert found["entropy"].tolist() == pytest.approx([-(p * p.log()).sum().item()] * 3)
    assert math.isnan(found["flips"][0])
    assert math.isnan(found["flips_null"][0])


def test_random_order_has_the_null_rank_and_constant_logits_have_it_exactly():
    metric = StepPredictions(steps=1, num_classes=9)
    metric.update(torch.zeros(1, 5, 9), torch.arange(5))
    assert metric.compute()["true_rank"].item() == 5.0
    assert metric.compute()["entropy"].item() == pytest.approx(math.log(9))
    assert math.isnan(metric.compute()["agreement"].item())


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(5, 30, 7, generator=generator),
        torch.randint(7, (30,), generator=generator),
    )
    whole, parts = StepPredictions(5, 7, reference=2), StepPredictions(5, 7, reference=2)
    whole.update(logits, labels)
    for rows in (slice(0, 11), slice(11, 30)):
        parts.update(logits[:, rows], labels[rows])
    for key, values in whole.compute().items():
        torch.testing.assert_close(parts.compute()[key], values, equal_nan=True)


def test_independent_predictions_flip_as_often_as_the_null_says():
    generator = torch.Generator().manual_seed(1)
    metric = StepPredictions(2, 4)
    metric.update(
        torch.randn(2, 40_000, 4, generator=generator), torch.zeros(40_000, dtype=torch.int64)
    )
    found = metric.compute()
    assert found["flips"][1].item() == pytest.approx(found["flips_null"][1].item(), abs=0.01)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_image():
    with pytest.raises(UserError, match="no image"):
        StepPredictions(2, 4).compute()


def test_labels_of_another_batch_are_refused():
    with pytest.raises(TypeCheckError):
        StepPredictions(2, 4).update(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
