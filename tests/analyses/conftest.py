"""Data whose answer is known on paper: squares on a 32-px image, and digits-s."""

from __future__ import annotations

import numpy as np
import pytest

from bvit_interp.data.digits import DigitScenes
from bvit_interp.vocabulary import IGNORE


class Squares:
    """32-px images; image i shows a 16-px square of class i % 3 + 1 in one of nine places on an
    8-px raster."""

    classes = ("a", "b", "c")
    official = True
    native_size = 32
    has_masks = True

    def __init__(self, count: int = 27, ignore: bool = False, empty: int = 0) -> None:
        self.count, self.ignore, self.empty = count, ignore, empty

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"square-{i}"

    def read(self, i: int):
        label = i % 3
        row, col = 8 * (i // 3 % 3), 8 * (i // 9 % 3)
        mask = np.zeros((32, 32), np.int32)
        if i >= self.empty:
            mask[row : row + 16, col : col + 16] = label + 1
        if self.ignore:
            mask[:8] = IGNORE
        image = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return image, label, mask


@pytest.fixture
def squares():
    """`Squares(count, ignore, empty)`."""
    return Squares


@pytest.fixture
def digits():
    """Sixty scenes of digits-s."""
    return DigitScenes("test", length=60)
