"""Rows of images in one picture, with one patch of each framed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

FRAME = (255, 0, 255)
"""Magenta, which is rare in photographs."""

Picture = UInt8[np.ndarray, "height width 3"]


def contact_sheet(
    rows: Sequence[Sequence[tuple[Picture, int]]], grid: tuple[int, int]
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """The images of all rows as one picture.

    Parameters
    ----------
    rows : images of one size, and the patch to frame in each, counted row by row from 0; all rows
        have the same number of images.
    grid : rows and columns of patches in an image.
    """
    framed = [
        np.concatenate([_with_frame(image, patch, grid) for image, patch in row], axis=1)
        for row in rows
    ]
    return np.concatenate(framed)


def _with_frame(image: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """The image with a frame in the pixels around a patch."""
    size = (image.shape[0] // grid[0], image.shape[1] // grid[1])
    width = max(1, image.shape[0] // 64)
    starts = [place * side for place, side in zip(divmod(patch, grid[1]), size, strict=True)]
    inner = tuple(slice(start, start + side) for start, side in zip(starts, size, strict=True))
    outer = tuple(slice(max(0, part.start - width), part.stop + width) for part in inner)
    framed = image.copy()
    framed[outer] = FRAME
    framed[inner] = image[inner]
    return framed
