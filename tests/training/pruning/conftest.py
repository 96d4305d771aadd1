"""Images that the tests of pruning share."""

from __future__ import annotations

import pytest

from bvit_interp.data.digits import DigitScenes
from bvit_interp.training.pruning.subsets import Pool


@pytest.fixture(scope="module")
def pools():
    """200 training scenes and 60 test scenes of the digits 1, 4 and 7."""
    classes = ("1", "4", "7")
    return Pool(DigitScenes("train"), classes, 200), Pool(DigitScenes("test", 200), classes, None)
