"""Recipes that are refused."""

from __future__ import annotations

import math

import pytest

from bvit_interp.analyses.features import Config
from bvit_interp.analyses.features.recipe import Recipe
from bvit_interp.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"n_copies": 0}, "n-copies must be >= 1, got 0"),
        ({"jitter": -1}, "jitter must be >= 0, got -1"),
        ({"tv_weight": -0.1}, "tv-weight must be >= 0, got -0.1"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"activation_weight": math.nan}, "activation-weight must be > 0, got nan"),
    ],
)
def test_recipes_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Recipe(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "salt"}, "noise must be one of channel, pixel, got 'salt'"),
        ({"site": "z"}, "site must be one of mlp_post, mlp_pre, got 'z'"),
        ({"parametrisation": "jpeg"}, "parametrisation must be one of pixel, fourier, got 'jpeg'"),
    ],
)
def test_words_that_are_refused(options, message):
    """Through the command's options: the test run checks the types of `Recipe` itself."""
    with pytest.raises(UserError, match=message):
        Config(**options)
