"""Batches of subsets: their share of own images, order and content."""

from __future__ import annotations

import numpy as np

from bvit_interp.training.pruning import subsets
from bvit_interp.training.pruning.subset_batches import Batches
from bvit_interp.training.pruning.subsets import Part


class Plain:
    """In the place of an `Augmentation`: images as they are, and what was drawn for them."""

    width = 4

    def __init__(self):
        self.drawn = []

    def cropped(self, images, draws):
        self.drawn.append(draws[0])
        return images

    def coloured(self, images, draws):
        np.testing.assert_array_equal(draws, self.drawn)
        return images.float()


view = Plain()


def test_batches_of_a_class_are_half_its_own_and_go_through_all_of_them(recipe, pools):
    train, test = pools
    parts = subsets.by_class(train, test).parts
    batches = Batches(recipe(batch_size=8), train, parts, view, (0,), 60)
    seen = {k: [] for k in range(3)}
    for j in range(60):
        labels = train.labels[batches.positions(j)]
        assert (labels == j % 3).sum() == 4
        seen[j % 3] += batches.positions(j)[:4].tolist()
    for k, part in enumerate(parts):  # every image as often as every other, give or take a pass
        counts = np.bincount(seen[k], minlength=len(train))[part.own]
        assert counts.max() - counts.min() <= 1
        assert sorted(seen[k][: len(part.own)]) == part.own.tolist()
    drawn = []
    for j in (5, 8, 5):
        batches.view = Plain()
        images, labels = batches[j]
        np.testing.assert_array_equal(labels, train.labels[batches.positions(j)])
        np.testing.assert_array_equal(
            images[2].byte().permute(1, 2, 0), train.read(batches.positions(j)[2])
        )
        drawn.append(np.array(batches.view.drawn))
    np.testing.assert_array_equal(drawn[0], drawn[2])  # of the seed, the key and the batch alone
    assert len({value for table in drawn[:2] for value in table.flat}) == 2 * 8 * 4


def test_a_small_subset_is_repeated(recipe, pools):
    part = Part("two", np.array([3, 5]), np.arange(0))
    batches = Batches(recipe(batch_size=8), pools[0], [part], view, (0,), 3)
    assert np.bincount(batches.positions(2))[[3, 5]].tolist() == [4, 4]
