"""Numbers beyond reason: refused by the option's name, whatever command has it."""

from __future__ import annotations

from dataclasses import make_dataclass

import pytest

from bvit_interp.cli import ranges
from bvit_interp.errors import UserError


def options(name, value):
    return {"group": make_dataclass("Options", [(name, object)])(value)}


@pytest.mark.parametrize("value", [10**12, -(10**12)])
@pytest.mark.parametrize(
    "name",
    ["n_copies", "steps", "shuffles", "threads", "seed", "runs", "n_top", "batch_size", "limit"],
)
def test_a_number_beyond_reason(name, value):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} takes .*{value}$"):
        ranges.check(options(name, value))
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} takes"):
        ranges.check(options(name, (1, value)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_number_that_is_none(value):
    with pytest.raises(UserError, match="^--tolerance takes"):
        ranges.check(options("tolerance", value))


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", -1), ("n_copies", 8), ("groups", 0), ("seed", 2**32 - 1), ("lr", None)],
)
def test_ordinary_numbers(name, value):
    ranges.check(options(name, value))
