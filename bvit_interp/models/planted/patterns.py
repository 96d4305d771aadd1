"""Patterns of patches with equal brightness and contrast, and their detectors."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.linalg import hadamard
from torch import Tensor

PATCH, GRID = 4, 8  # pixels of a patch, patches of an image
SIZE = PATCH * GRID
CLASSES = ("class 0", "class 1", "class 2", "class 3")
DISTRACTOR = len(CLASSES) + 1
"""Pattern 0 is constant, 1 to 4 are the classes', 5 the distractor's, the rest background."""
GREY, CONTRAST = 128, 64  # levels; a pattern is added to grey


@cache
def patterns() -> Int[np.ndarray, "16 4 4"]:
    """The 16 Walsh functions of a patch, with values +1 and -1."""
    rows = hadamard(PATCH)
    return np.stack([np.outer(a, b) for a in rows for b in rows])


def detector(pattern: int) -> Float[Tensor, "3 4 4"]:
    """The filter that gives 1 on a grey patch with this pattern and 0 on one with another pattern,
    for images in 0..1."""
    plane = torch.from_numpy(patterns()[pattern]).float()
    return (plane / (CONTRAST / 255 * 3 * PATCH**2)).repeat(3, 1, 1)
