"""The game on masks of a few pixels, worked out on paper."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import torch

from bvit_interp.analyses.pointing_game.game import brightness, on_other_masks, play

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


def test_points_are_the_maxima_that_are_not_ignored():
    ids = torch.zeros(2, 4, 4, dtype=torch.int64)
    ids[:, :2, :2] = 1
    ids[1, :2, 2:] = 1000
    maps = torch.tensor([[[0, 1, 1, 0], [2, 0, 0, 1]], [[0, 3, 3, 0], [0, 1, 0, 0]]])
    game = play(maps, ids, LABELS, (2, 2))
    assert game.points.tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 0], [1, 0, 2]]
    np.testing.assert_array_equal(game.patches, [[1, 0, 0, 0], [1, math.nan, 0, 0]])


def test_other_masks_on_paper():
    """Three images of two patches, one map; the last image ignores patch 1."""
    patches = np.array([[1, 0], [1, 1], [0, math.nan]])
    points = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 1], [2, 0, 0]])  # image 1 has two maxima
    others, moved = on_other_masks(points, patches, 1)
    # patch 1 of image 1: of the others only image 0 is not ignored, and it has no object there
    np.testing.assert_allclose(others[:, 0], [1 / 2, (1 / 2 + 0) / 2, 2 / 2])
    # shares of the points: 5/6 on patch 0 and 1/6 on patch 1; mean masks 2/3 and 1/2
    wanted = [
        5 / 6 * 1 / 3 - 1 / 6 * 1 / 2 * 3 / 2,
        5 / 6 * 1 / 3 + 1 / 6 * 1 / 2 * 3 / 2,
        -5 / 6 * 2 / 3,
    ]
    np.testing.assert_allclose(moved[:, 0], wanted)
    assert moved.mean() == pytest.approx(0)


def test_other_masks_equal_a_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    patches = (rng.random((7, 5)) < 0.4).astype(float)
    at = rng.integers(0, 5, (7, 3))
    points = np.array([(i, m, at[i, m]) for i in range(7) for m in range(3)])
    others, moved = on_other_masks(points, patches, 3)
    pairs = patches[:, at]  # of mask j and the point of image i in map m
    wanted = [[np.delete(pairs[:, i, m], i).mean() for m in range(3)] for i in range(7)]
    np.testing.assert_allclose(others, wanted)
    # without mask j the mean of the others moves away from it, but for those of its own point
    shift = [pairs[:, :, m].mean(1) - pairs[:, :, m].mean() for m in range(3)]
    np.testing.assert_allclose(moved, np.transpose(shift))


def test_a_point_that_is_the_same_in_all_images_gains_nothing():
    rng = np.random.default_rng(1)
    patches = (rng.random((9, 4)) < 0.5).astype(float)
    points = np.array([(i, 0, 2) for i in range(9)])
    others, _ = on_other_masks(points, patches, 1)
    assert (patches[:, 2] - others[:, 0]).mean() == pytest.approx(0)


def test_without_another_image_or_a_point_there_is_no_null():
    one, _ = on_other_masks(np.array([[0, 0, 1]]), np.ones((1, 2)), 1)
    assert np.isnan(one).all()
    two, moved = on_other_masks(np.array([[0, 0, 1], [1, 0, 1]]), np.ones((2, 2)), 2)
    np.testing.assert_array_equal(two, [[1, math.nan]] * 2)
    np.testing.assert_array_equal(moved, [[0, math.nan]] * 2)


def test_brightness_is_that_of_whole_patches():
    """Patch 1 is green, brighter than white-and-black patch 2; the last row and column are left
    out."""
    pixels = torch.zeros(1, 5, 7, 3, dtype=torch.uint8)
    pixels[0, :2, 3:6, 1] = 255
    pixels[0, 2:4, 0:2] = 255
    pixels[0, 2, 1] = 0
    pixels[0, 4], pixels[0, :, 6] = 255, 255
    luminance, variance = brightness(pixels, (2, 2))[0]
    green, white = 255 * 587, 255 * 1000
    assert luminance.tolist() == [0, 6 * green, 3 * white, 0]
    assert variance.tolist() == [0, 0, 6 * 3 * white**2 - (3 * white) ** 2, 0]
    assert torch.equal(brightness(pixels.repeat(3, 1, 1, 1), (2, 2))[2, 0], luminance)
