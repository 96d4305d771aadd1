"""After which step each image leaves when it leaves as soon as it is confident."""

from __future__ import annotations

import numpy as np


def exit_positions(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Position of the first confidence above `threshold`, else of the last.

    Parameters
    ----------
    confidence : ``(images, exits)``, the largest probability at each exit.
    threshold : 0..1.

    Returns
    -------
    ``(images,)`` int64, from 0.
    """
    confident = confidence > threshold
    confident[:, -1] = True
    return confident.argmax(1)


def random_exit_accuracy(right: np.ndarray, positions: np.ndarray) -> float:
    """Accuracy if as many images left at each exit, but drawn at random.

    Parameters
    ----------
    right : ``(images, exits)`` bool or 0..1, whether each exit is right.
    positions : ``(images,)``, where the images really left.
    """
    shares = np.bincount(positions, minlength=right.shape[1]) / len(positions)
    return float(shares @ right.mean(0))
