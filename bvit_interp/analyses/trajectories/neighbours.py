"""Nearest neighbours of points along trajectories: kept, adjacent, of one class.

Points are ordered image by image, with all steps of an image in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from sklearn.neighbors import NearestNeighbors


@dataclass(frozen=True)
class Neighbours:
    """Positions of the k nearest points of each point, in Euclidean distance.

    Attributes
    ----------
    any_image : among all other points.
    other_images : among the points of other images.
    """

    any_image: Int[np.ndarray, "points k"]
    other_images: Int[np.ndarray, "points k"]


def nearest_neighbours(points: Float[np.ndarray, "points width"], k: int, steps: int) -> Neighbours:
    """The k nearest neighbours of each point, by exact search.

    Parameters
    ----------
    points : `steps` points per image; more than k of other images.
    """
    # of the nearest, at most steps - 1 are of the same image
    count = min(k + steps - 1, len(points) - 1)
    nearest = NearestNeighbors(n_neighbors=count).fit(points).kneighbors(return_distance=False)
    same_image = nearest // steps == (np.arange(len(points)) // steps)[:, None]
    others_first = np.argsort(same_image, axis=1, kind="stable")[:, :k]
    return Neighbours(nearest[:, :k], np.take_along_axis(nearest, others_first, axis=1))


def same_step_neighbours(
    points: Float[np.ndarray, "points width"], k: int, steps: int
) -> Int[np.ndarray, "points k"]:
    """The k nearest neighbours of each point among other images' points of the same step.

    So they are k different images at every step, of as many candidates.

    Parameters
    ----------
    points : `steps` points per image, of more than k images.
    """
    nearest = np.empty((len(points), k), dtype=np.intp)
    for step in range(steps):
        search = NearestNeighbors(n_neighbors=k).fit(points[step::steps])
        nearest[step::steps] = search.kneighbors(return_distance=False) * steps + step
    return nearest


def share_kept(
    before: Int[np.ndarray, "points k"], after: Int[np.ndarray, "points k"]
) -> Float[np.ndarray, " points"]:
    """Share of each point's neighbours before that are among its neighbours after."""
    return (before[:, :, None] == after[:, None, :]).any(2).mean(1)


def share_within_one_step(
    neighbours: Int[np.ndarray, "points k"], step: Int[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """Share of each point's neighbours that are at most one step away."""
    return (abs(step[neighbours] - step[:, None]) <= 1).mean(1)


def share_of_class(
    neighbours: Int[np.ndarray, "points k"], label: Int[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """Share of each point's neighbours that are of its class."""
    return (label[neighbours] == label[:, None]).mean(1)


def share_within_one_step_null(steps: int) -> Float[np.ndarray, " steps"]:
    """Expected `share_within_one_step` at each step if the steps of other images are permuted."""
    step = np.arange(steps)
    return (abs(step[:, None] - step) <= 1).mean(1)


def share_of_class_null(labels: Int[np.ndarray, " images"]) -> Float[np.ndarray, " images"]:
    """Expected `share_of_class` of each image if the labels of the other images are permuted."""
    return (np.bincount(labels)[labels] - 1) / (len(labels) - 1)
