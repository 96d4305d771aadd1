"""Options of pruning step by step that are refused."""

from __future__ import annotations

import pytest

from bvit_interp.errors import UserError
from bvit_interp.training.pruning.step_plan import StepPlan


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"graft_epochs": 0}, "graft-epochs must be >= 1, got 0"),
        ({"rate": 0.0}, "rate must be between 0 and 1, got 0.0"),
        ({"rate": 1.0}, "rate must be between 0 and 1, got 1.0"),
        ({"rate": float("nan")}, "rate must be between 0 and 1, got nan"),
        ({"ranking": "step"}, "ranking must be global, layer, got 'step'"),
        ({"methods": ()}, "methods must be of rtl, magnitude, random, each once, got none"),
        ({"methods": ("rtl", "snip")}, "got rtl, snip"),
        ({"methods": ("rtl", "rtl")}, "each once"),
    ],
)
def test_options_that_cannot_be(change, wrong):
    with pytest.raises(UserError, match=wrong):
        StepPlan(**change)
