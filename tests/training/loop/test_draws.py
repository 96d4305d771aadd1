"""Tables of random numbers, and global generators that are restored."""

# ruff: noqa: NPY002  numpy's global generator is what timm draws from
from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from bvit_interp.training.loop.draws import Draws, seed_generators, seeded, to_device


@pytest.mark.parametrize("width", [0, 1, 4, 58, 61])
def test_a_row_alone_is_that_of_the_table(width):
    draws = Draws([3, 1], width)
    table = draws.table(40)
    assert table.shape == (40, draws.width)
    assert draws.width % 4 == 0 and 0 <= draws.width - width < 4
    np.testing.assert_array_equal(draws.table(7), table[:7])  # however many there are
    for r in (39, 0, 17, 1, 17):
        np.testing.assert_array_equal(draws.row(r), table[r])


def test_rows_far_down_the_table():
    far = Draws([0], 60).row(2**33)  # more than 32 bits
    assert not np.isin(far, Draws([0], 60).table(50)).any()


def test_no_number_comes_twice_in_a_table_or_in_that_of_another_key():
    tables = [Draws(key, 8).table(100) for key in ([0, 1], [1, 0], [0, 2], [0, 1, 1], [2**40, 1])]
    assert len(np.unique(tables)) == np.size(tables)
    np.testing.assert_array_equal(Draws((0, 1), 8).table(100), tables[0])


def test_they_are_uniform_in_every_column_and_independent_of_the_row_before():
    table = Draws([5, 5], 12).table(5000)
    assert table.min() >= 0 and table.max() < 1
    for column in table.T:
        assert kstest(column, "uniform").statistic < 0.03  # 1.95 / sqrt(5000), p < 0.001
    joint = np.corrcoef(np.concatenate([table[:-1], table[1:]], 1).T)
    assert np.abs(joint - np.eye(24)).max() < 0.07


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_draws_depend_on_the_numbers_alone_and_leave_no_trace():
    before, found = states(), []
    for numbers in ((1, 2), (1, 2), (1, 3), (2, 2)):
        with seeded(*numbers):
            found.append(draw())
        assert states() == before
    assert found[0] == found[1]
    assert all(len({triple[i] for triple in found}) == 3 for i in range(3))
    with contextlib.suppress(KeyError), seeded(9):
        draw()
        raise KeyError
    assert states() == before


def test_within_another_they_leave_no_trace_either():
    with seeded(1):
        expected = draw(), draw()
    with seeded(1):
        first = draw()
        with seeded(2):
            draw()
        assert (first, draw()) == expected


def test_reseeding_is_what_is_drawn_for_the_same_numbers():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with seeded(4, 2):
        expected = draw()
    seed_generators(4, 2)
    assert draw() == expected
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def test_an_array_that_is_not_contiguous_is_sent_as_it_is():
    array = np.arange(12.0).reshape(3, 4)[:, ::-2]
    np.testing.assert_array_equal(to_device(array, "cpu"), array)
