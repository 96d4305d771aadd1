"""Scenes whose object brightness, contrast and centre do not give away.

An image has 8 x 8 patches of 4 px. Every patch is a pattern of black and white, one of the 15
Walsh functions of 4 x 4 px without the constant one, with a random sign: all patches have the same
mean and the same contrast. The object is a square of 3 x 3 patches at a random place, whose pattern
is that of the class, with positive sign. Another square, of as many patches, shows the distractor's
pattern. The other patches have patterns of neither kind.
"""

from __future__ import annotations

import numpy as np

from bvit_interp.models.planted.patterns import (
    CLASSES,
    CONTRAST,
    DISTRACTOR,
    GREY,
    GRID,
    PATCH,
    SIZE,
    patterns,
)

SIDE = 3  # patches of the object and of the distractor


class Scenes:
    """Scenes with masks, `Samples`; scene i is the same on every machine.

    Parameters
    ----------
    length : number of scenes.
    seed : of the random draws.
    """

    classes = CLASSES
    native_size: int | None = SIZE
    has_masks = True

    def __init__(self, length: int = 200, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"scenes/{self.seed}/{i:06d}"

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Scene i: image ``(32, 32, 3)`` uint8, label, and mask ``(32, 32)`` int32.

        The mask is label + 1 on the object and 0 elsewhere.
        """
        rng = np.random.default_rng([self.seed, i])
        label = int(rng.integers(len(CLASSES)))
        chosen = rng.integers(DISTRACTOR + 1, PATCH**2, (GRID, GRID))
        signs = rng.choice([-1, 1], (GRID, GRID))
        object_, distractor = _two_squares(rng)
        for square, pattern in ((distractor, DISTRACTOR), (object_, label + 1)):
            chosen[square], signs[square] = pattern, 1
        planes = patterns()[chosen] * signs[..., None, None]  # (row, column, y, x)
        image = GREY + CONTRAST * planes.transpose(0, 2, 1, 3).reshape(SIZE, SIZE)
        mask = np.zeros((GRID, GRID), np.int32)
        mask[object_] = label + 1
        pixels = np.repeat(image.astype(np.uint8)[..., None], 3, axis=-1)
        return pixels, label, mask.repeat(PATCH, axis=0).repeat(PATCH, axis=1)


def _two_squares(rng: np.random.Generator) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Two squares of patches that do not overlap; each is equally often everywhere."""
    while True:
        first, second = (rng.integers(0, GRID - SIDE + 1, 2) for _ in range(2))
        if np.abs(first - second).max() >= SIDE:
            return _square(first), _square(second)


def _square(corner: np.ndarray) -> tuple[slice, slice]:
    row, column = corner.tolist()
    return slice(row, row + SIDE), slice(column, column + SIDE)
