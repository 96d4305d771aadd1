"""The exact solver of a probe, and its null of random weights."""

from __future__ import annotations

import numpy as np
import torch

from bvit_interp.training.adapting import probe
from bvit_interp.training.adapting.transfer_plan import Plan
from bvit_interp.training.adapting.tuning import recipe_of


def test_the_exact_solver_stands_where_a_long_trained_probe_ends():
    """Two classes that a line through a known place tells: test images on either side of it, one
    mislabelled."""
    x = torch.tensor([[-1.0], [-0.5], [0.5], [1.0], [3.0]])
    y = torch.tensor([0, 0, 1, 1, 1])
    assert (
        probe.exact_accuracy(
            (x, y), (torch.tensor([[-2.0], [2.0], [2.0]]), torch.tensor([0, 1, 0]))
        )
        == 2 / 3
    )


def test_random_weights_are_fresh_and_drawn_by_seed(any_model):
    before = torch.get_rng_state()
    one, same, other = (
        dict(probe.with_random_weights(any_model, seed).named_parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in any_model.named_parameters():
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], tensor), name
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert torch.equal(one["norm.weight"], torch.ones(32))


def test_batches_of_features_come_in_the_order_of_the_epoch():
    """The permutation of (seed, epoch), without an incomplete last batch."""
    recipe = recipe_of(Plan(epochs=1, train_batch=4), "probe", 3, "colours", 10)
    labels = torch.arange(10)
    features = labels[:, None] * 2.0
    order = np.random.default_rng([3, 5]).permutation(10)[:8]
    found = list(probe.feature_batches((features, labels), recipe, 5))
    assert [batch.tolist() for _, batch in found] == [order[:4].tolist(), order[4:].tolist()]
    assert all(torch.equal(inputs[:, 0], 2.0 * batch) for inputs, batch in found)
