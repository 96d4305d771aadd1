"""The options that every analysis shares."""

from __future__ import annotations

import importlib

import pytest

from bvit_interp.analyses import ANALYSES
from bvit_interp.errors import UserError

CONFIGS = {
    word: importlib.import_module(f"bvit_interp.analyses.{word}").Config for word in ANALYSES
}


@pytest.mark.parametrize("word", ANALYSES)
def test_bad_numbers_are_refused_by_name(word):
    for name, value in (("limit", 0), ("batch_size", 0), ("resize", -1), ("workers", -1)):
        with pytest.raises(
            UserError, match=f"{name.replace('_', '-')} must be >= [01], got {value}"
        ):
            CONFIGS[word](**{name: value})
    if "seed" in CONFIGS[word].__dataclass_fields__:
        with pytest.raises(UserError, match="seed must be"):
            CONFIGS[word](seed=-1)
