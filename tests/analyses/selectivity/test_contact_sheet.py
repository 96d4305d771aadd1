"""Pictures of framed images, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from bvit_interp.analyses.selectivity.contact_sheet import contact_sheet


def noise(seed, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 200, (*size, 3)).astype(np.uint8)


def test_rows_of_images_with_a_frame_around_a_patch_of_each():
    rows = [[(noise(0), 0), (noise(1), 6)], [(noise(2), 15), (noise(3), 1)]]
    picture = contact_sheet(rows, (4, 4))
    assert picture.shape == (64, 64, 3)
    for (row, column), (r, c) in {
        (0, 0): (0, 0),
        (0, 1): (1, 2),
        (1, 0): (3, 3),
        (1, 1): (0, 1),
    }.items():
        expected = rows[row][column][0].copy()
        framed = np.zeros((34, 34), bool)  # a pixel of margin all around
        framed[8 * r : 8 * r + 10, 8 * c : 8 * c + 10] = True
        framed[8 * r + 1 : 8 * r + 9, 8 * c + 1 : 8 * c + 9] = False
        expected[framed[1:-1, 1:-1]] = (255, 0, 255)
        part = picture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        np.testing.assert_array_equal(part, expected)
    assert (rows[0][0][0] < 200).all()  # the images themselves stay as they are


def test_a_large_image_has_a_thicker_frame_and_the_grid_need_not_be_square():
    image = noise(4, (128, 192))
    picture = contact_sheet([[(image, 7)]], (2, 6))  # row 1, column 1: pixels 64.. and 32..
    changed = (picture != image).any(-1)
    expected = np.zeros((128, 192), bool)
    expected[62:128, 30:66] = True
    expected[64:128, 32:64] = False
    np.testing.assert_array_equal(changed, expected)


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError):
        contact_sheet([[(np.zeros((8, 8), np.uint8), 0)]], (2, 2))
