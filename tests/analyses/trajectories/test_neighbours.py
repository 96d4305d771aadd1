"""Neighbours and their shares on a line, by hand, and nulls over all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from bvit_interp.analyses.trajectories.neighbours import (
    nearest_neighbours,
    same_step_neighbours,
    share_kept,
    share_of_class,
    share_of_class_null,
    share_within_one_step,
    share_within_one_step_null,
)


def test_points_on_a_line():
    """Two images of three steps at 0, 1, 2.1 and 10, 11, 13."""
    points = np.array([[0.0], [1.0], [2.1], [10.0], [11.0], [13.0]])
    nearest = nearest_neighbours(points, 2, 3)
    assert [set(row) for row in nearest.any_image.tolist()] == [
        {1, 2},
        {0, 2},
        {0, 1},
        {4, 5},
        {3, 5},
        {3, 4},
    ]
    others = nearest.other_images
    assert others.tolist() == [[3, 4], [3, 4], [3, 4], [2, 1], [2, 1], [2, 1]]
    step = np.array([0, 1, 2, 0, 1, 2])
    # neighbours at steps 0 and 1, then at steps 2 and 1
    assert share_within_one_step(others, step).tolist() == [1, 1, 0.5, 0.5, 1, 1]
    label = np.array([7, 7, 7, 4, 4, 4])
    assert share_of_class(nearest.any_image, label).tolist() == [1] * 6
    assert share_of_class(others, label).tolist() == [0] * 6
    assert share_of_class(others[:, :1], np.array([1, 1, 1, 1, 2, 2])).tolist() == [1] * 4 + [0, 0]


def test_other_images_are_found_past_the_own_ones():
    """All steps of an image are nearer to one another than to the other image's."""
    points = np.array([[0.0], [0.1], [0.2], [0.3], [5.0], [6.0], [7.0], [8.0]])
    nearest = nearest_neighbours(points, 3, 4)
    assert nearest.other_images[:4].tolist() == [[4, 5, 6]] * 4
    assert nearest.other_images[7].tolist() == [3, 2, 1]


def test_neighbours_at_the_same_step_are_other_images():
    """Four images of two steps: at step 1 at 0, 1, 3, 7; at step 2 at 3.1, 0.1, 7.1, 3.2. Among all
    points image 0 at step 1 is nearest to image 1 at step 2."""
    points = np.array([[0.0], [3.1], [1.0], [0.1], [3.0], [7.1], [7.0], [3.2]])
    found = same_step_neighbours(points, 2, 2)
    assert found[::2].tolist() == [[2, 4], [0, 4], [2, 0], [4, 2]]
    assert found[1::2].tolist() == [[7, 3], [1, 7], [7, 1], [1, 3]]
    assert nearest_neighbours(points, 2, 2).other_images[0].tolist() == [3, 2]
    same = same_step_neighbours(np.zeros((6, 3)), 2, 2)  # equal points: never the image itself
    for point, row in enumerate(same.tolist()):
        assert sorted(row) == [p for p in range(point % 2, 6, 2) if p != point]


def test_kept():
    before = np.array([[1, 2, 3], [0, 2, 3]])
    after = np.array([[3, 4, 1], [5, 6, 7]])
    np.testing.assert_allclose(share_kept(before, after), [2 / 3, 0])


def test_the_null_of_steps_is_the_mean_over_permutations():
    every = np.array(list(itertools.permutations(range(4))))
    expected = [(abs(every - t) <= 1).mean() for t in range(4)]
    np.testing.assert_allclose(share_within_one_step_null(4), expected)
    np.testing.assert_allclose(share_within_one_step_null(4), [0.5, 0.75, 0.75, 0.5])


def test_the_null_of_classes_is_the_mean_over_permutations():
    labels = np.array([0, 0, 0, 1, 2, 2])
    expected = []
    for image, label in enumerate(labels):
        others = np.delete(labels, image)
        every = np.array(list(itertools.permutations(others)))
        expected.append((every[:, 0] == label).mean())
    np.testing.assert_allclose(share_of_class_null(labels), expected)


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError):
        nearest_neighbours(np.zeros(6), 2, 3)
    with pytest.raises(TypeCheckError):
        share_within_one_step(np.zeros((3, 2), int), np.zeros(4, int))
    with pytest.raises(TypeCheckError):
        share_kept(np.zeros((3, 2), int), np.zeros((3, 4), int))
