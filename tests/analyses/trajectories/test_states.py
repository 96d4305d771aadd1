"""States come back in the data set's order, as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from bvit_interp.analyses.trajectories.states import StateTable
from bvit_interp.errors import UserError


def test_in_order_whatever_came_first():
    states = torch.arange(4 * 2 * 3).reshape(4, 2, 3).double()
    metric = StateTable(2, 3)
    metric.update(torch.tensor([7, 1]), torch.tensor([3, 0]), states[[3, 0]])
    metric.update(torch.tensor([5, 2]), torch.tensor([2, 1]), states[[2, 1]])
    index, labels, found = metric.compute()
    assert index.tolist() == [1, 2, 5, 7]
    assert labels.tolist() == [0, 1, 2, 3]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, states.numpy())


def test_a_process_without_images_takes_part():
    """What `sync` sends for it: nothing, in the others' dtypes."""
    metric = StateTable(2, 3)
    sent = {}

    def gather(tensor, group=None):
        sent[tensor.dtype] = sent.get(tensor.dtype, 0) + tensor.numel()
        return [tensor]

    metric.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    assert sent == {torch.int64: 0, torch.float32: 0}


def test_bad_states():
    metric = StateTable(2, 3)
    with pytest.raises(UserError, match=r"\(1, 2, 3\), got \(1, 3, 2\)"):
        metric.update(torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 3, 2))
    with pytest.raises(UserError, match="NaN or infinite"):
        metric.update(torch.tensor([0]), torch.tensor([0]), torch.full((1, 2, 3), torch.nan))


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError):
        StateTable(2, 3).update(torch.tensor([0]), torch.tensor([0]), torch.zeros(2, 3))
    with pytest.raises(TypeCheckError):
        StateTable(2, 3).update(torch.tensor([0]), torch.tensor([0, 1]), torch.zeros(1, 2, 3))
