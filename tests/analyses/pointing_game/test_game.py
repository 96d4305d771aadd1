"""The game on masks of a few pixels, worked out on paper."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch

from bvit_interp.analyses.pointing_game.game import play

IDS = torch.tensor(
    [
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2], [0, 0, 0, 2]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1000, 1000], [0, 0, 1000, 1000]],
    ]
)
LABELS = torch.tensor([0, 0])
MAPS = torch.eye(4).expand(2, 4, 4)  # map m has its maximum at patch m of 2 x 2


def test_own_object_on_paper():
    """Patch (r, c) has its centre at pixel (2 r + 1, 2 c + 1); the middle is pixel (2, 2)."""
    game = play(MAPS, IDS, LABELS, (2, 2))
    np.testing.assert_array_equal(game.hits, [[1, 0, 0, 0], [math.nan] * 4])
    assert game.has_object.tolist() == [True, False]
    assert game.chance.tolist() == [4 / 16, 0]
    np.testing.assert_array_equal(game.centre, [0, math.nan])
    assert torch.equal(game.objects[0], IDS[0] == 1)
    assert not game.objects[1].any()


def test_any_object_and_ignored_pixels():
    ids = IDS.clone()
    ids[0, 0, :] = 1000
    game = play(MAPS, ids, LABELS, (2, 2), target="any")
    np.testing.assert_array_equal(game.hits, [[1, 0, 0, 1], [math.nan] * 4])
    assert game.chance[0] == pytest.approx(5 / 12)  # two of class 0, three of class 1, four ignored
    assert game.centre[0] == 1


def test_majority_of_a_patch():
    """Three of four pixels of patch 3 are set, and two of four of patch 2 are too few."""
    ids = IDS.clone()
    ids[0, 2:, 0] = 2
    game = play(MAPS, ids, torch.tensor([1, 0]), (2, 2), point="majority")
    np.testing.assert_array_equal(game.hits[0], [0, 0, 0, 1])
    assert game.chance[0] == 1 / 4
    assert play(MAPS, ids, torch.tensor([1, 0]), (2, 2)).chance[0] == 5 / 16


def test_tolerance_widens_the_object():
    """The centre of patch 1, pixel (1, 3), is 1 from pixel (2, 3); that of patch 2 is farther."""
    narrow, wide = (
        play(MAPS, IDS, torch.tensor([1, 0]), (2, 2), tolerance=radius) for radius in (1.0, 1.1)
    )
    np.testing.assert_array_equal(narrow.hits[0], [0, 0, 0, 1])
    np.testing.assert_array_equal(wide.hits[0], [0, 1, 0, 1])
    assert narrow.chance[0] == 3 / 16
    assert wide.chance[0] == 7 / 16
    assert torch.equal(wide.objects[0], IDS[0] == 2)  # the object itself stays


def test_maps_of_steps_and_heads():
    maps = torch.zeros(2, 3, 2, 4)
    maps[0, 1, 1, 0] = 1
    hits = play(maps, IDS, LABELS, (2, 2)).hits
    assert hits.shape == (2, 3, 2)
    assert hits[0].flatten().tolist() == [0.25, 0.25, 0.25, 1, 0.25, 0.25]
    assert hits[1].isnan().all()


def test_middle_of_an_oblong_image():
    """Of 4 x 8 pixels it is pixel (2, 4)."""
    ids = torch.zeros(2, 4, 8, dtype=torch.int64)
    ids[0, 2, 4] = 1
    ids[1] = 1
    ids[1, 2, 4] = 0
    maps = torch.eye(8).expand(2, 8, 8)
    assert play(maps, ids, LABELS, (2, 4)).centre.tolist() == [1, 0]


def test_wrong_shapes_are_refused():
    for maps, ids, labels in (
        (MAPS[:1], IDS, LABELS),
        (MAPS, IDS[0], LABELS),
        (MAPS, IDS.float(), LABELS),
        (MAPS, IDS, LABELS[:, None]),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            play(maps, ids, labels, (2, 2))
