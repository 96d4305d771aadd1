"""Another image for every image: half the chosen set on, the same for any batch, never the image
itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.data.partners import Partners
from bvit_interp.errors import DataError, UserError


class Numbered:
    """Image i is filled with i; images in `broken` cannot be read."""

    classes = ("a", "b")
    native_size = 4
    has_masks = False

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def name(self, i):
        return f"image-{i}"

    def read(self, i):
        if i in self.broken:
            raise DataError(f"image-{i}: broken")
        return np.full((4, 4, 3), i, np.uint8), i % 2, None


def as_tensor(image, mask):
    return torch.from_numpy(image).permute(2, 0, 1).float(), None


def shown(partners, index):
    images, labels = partners(torch.tensor(index), as_tensor)
    return images[:, 0, 0, 0].int().tolist(), labels.tolist()


def test_the_partner_is_half_the_chosen_images_on():
    assert shown(Partners(Numbered(6)), [0, 1, 5]) == ([3, 4, 2], [1, 0, 0])
    # of the places 0, 3, 6, 9
    assert shown(Partners(Numbered(12), limit=4), [0, 3, 6, 9])[0] == [
        6,
        9,
        0,
        3,
    ]
    assert shown(Partners(Numbered(3)), [0, 1, 2])[0] == [1, 2, 0]


def test_a_partner_that_cannot_be_read_is_an_error_or_the_next_one():
    with pytest.raises(DataError, match="image-3"):
        shown(Partners(Numbered(6, broken=[3])), [0])
    assert shown(Partners(Numbered(6, broken=[3]), skip_corrupt=True), [0])[0] == [4]
    assert shown(Partners(Numbered(6, broken=[2, 3, 4, 5]), skip_corrupt=True), [0])[0] == [1]
    with pytest.raises(DataError, match="partner of image-0"):
        shown(Partners(Numbered(2, broken=[1]), skip_corrupt=True), [0])


def test_one_image_has_no_partner():
    with pytest.raises(UserError, match="at least 2"):
        Partners(Numbered(1))
