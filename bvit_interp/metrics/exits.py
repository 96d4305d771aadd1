"""Leaving as soon as a classifier is confident."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Values = TypeVar("Values", np.ndarray, Tensor)


def is_confident(confidence: Values, threshold: float) -> Values:
    """Whether an image leaves: its confidence, the largest probability, exceeds the threshold."""
    return confidence > threshold


def exit_positions(
    confidence: Float[np.ndarray, "images exits"], threshold: float
) -> Int[np.ndarray, " images"]:
    """Position, from 0, of the first exit whose confidence exceeds `threshold`, else of the last.

    Parameters
    ----------
    confidence : the largest probability at each exit.
    threshold : 0..1.
    """
    confident = is_confident(confidence, threshold)
    confident[:, -1] = True
    return confident.argmax(1)


def random_exit_accuracy(
    right: Shaped[np.ndarray, "images exits"],
    positions: Int[np.ndarray, " images"],
) -> float:
    """Accuracy expected if as many images left at each exit, but drawn at random.

    Parameters
    ----------
    right : bool or 0..1, whether the prediction of each exit is correct.
    positions : where the images actually left, from 0.
    """
    shares = np.bincount(positions, minlength=right.shape[1]) / len(positions)
    return float(shares @ right.mean(0))
