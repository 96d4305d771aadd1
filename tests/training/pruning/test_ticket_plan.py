"""The rounds of a ticket search, and options that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from bvit_interp.errors import UserError
from bvit_interp.training.pruning.ticket_plan import TicketPlan, schedule


def test_rounds_meet_every_target_in_equal_ratios():
    assert schedule((0.5, 0.25, 0.75), 0.5) == [(0.25, True), (0.5, True), (0.75, True)]
    rounds = schedule((0.0, 0.36, 0.9), 0.2)
    assert [s for s, target in rounds if target] == [0.0, 0.36, 0.9]
    np.testing.assert_allclose([s for s, _ in rounds[:3]], [0, 0.2, 0.36])
    density = 1 - np.array([s for s, _ in rounds[2:]])
    ratios = density[1:] / density[:-1]
    np.testing.assert_allclose(ratios, ratios[0])
    assert (
        0.8 <= ratios[0] < 0.8 ** (8 / 9)
    )  # ln(0.1 / 0.64) / ln(0.8) = 8.3: nine rounds, and eight were too few


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": "colour"}, "by must be one of class, class-step, cluster, column, got 'colour'"),
        ({"by": "column"}, "--column FILE.csv:COLUMN is given with --by column"),
        ({"by": "cluster"}, "--features CKPT is given with --by cluster"),
        ({"features": "x"}, "--features CKPT is given with --by cluster"),
        ({"sparsity": (0.5, 1.0)}, "sparsity must be in 0..1, below 1, got 0.5, 1.0"),
        ({"sparsity": ()}, "sparsity must be in 0..1, below 1, got none"),
        ({"rate": 1.0}, "rate must be between 0 and 1"),
        ({"retrain_epochs": 0}, "retrain-epochs must be >= 1, got 0"),
        ({"methods": ("rtl", "rtl")}, "methods must be of rtl, imp, multi, random, each once"),
        ({"algorithm": "means"}, "algorithm must be kmeans or hdbscan"),
    ],
)
def test_options_that_do_not_do(given, message):
    with pytest.raises(UserError, match=message):
        TicketPlan(**given)
