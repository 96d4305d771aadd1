"""Tensors in nested arguments and results."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch

from bvit_interp.models.nested import first_tensor, map_tensors, with_first

Pair = namedtuple("Pair", "tokens loss")
ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


@pytest.mark.parametrize(
    "values",
    [
        ONE,
        (None, ONE, TWO),
        [[], {"a": None, "b": (ONE, TWO)}],
        Pair(ONE, TWO),
        OrderedDict(tokens=ONE, loss=TWO),
        ((), {"x": ONE}),
    ],
    ids=["tensor", "tuple", "deep", "namedtuple", "dict", "arguments"],
)
def test_the_first_tensor_is_found_and_replaced_in_a_container_of_the_same_kind(values):
    assert first_tensor(values) is ONE
    changed = with_first(values, torch.zeros(2))
    assert type(changed) is type(values)
    assert torch.equal(first_tensor(changed), torch.zeros(2))
    assert first_tensor(values) is ONE
    doubled = map_tensors(values, lambda tensor: 2 * tensor)
    assert type(doubled) is type(values)
    assert torch.equal(first_tensor(doubled), TWO)


def test_other_tensors_stay():
    assert with_first(Pair(ONE, TWO), 3 * ONE).loss is TWO
    assert torch.equal(map_tensors(Pair(ONE, TWO), torch.neg).loss, -TWO)


@pytest.mark.parametrize("values", [None, 3, "text", (), {"a": [None]}])
def test_where_there_is_none(values):
    assert first_tensor(values) is None
    assert map_tensors(values, torch.neg) == values
