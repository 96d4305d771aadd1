"""Training images of a transfer, and what is refused."""

from __future__ import annotations

import pytest

from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.training.adapting.transfer_data import trained_class, training_images


def test_bad_data(one_colour, work):
    one = open_samples(str(one_colour), "train")
    with pytest.raises(UserError, match=r"the data set has one class \(red\)"):
        training_images(one, None)
    three = work().train.pool.samples
    with pytest.raises(UserError, match=r"no training image of 1 classes: .*\(raise n-train\)"):
        training_images(three, 2)
    empty = FewLabels()
    with pytest.raises(UserError, match="no training image of 1 classes: mauve$"):
        training_images(empty, None)
    with pytest.raises(UserError, match="lack 2 classes of the test set: green, blue|blue, green"):
        trained_class(three, ("red",))


class FewLabels:
    """Samples with a class that no image has."""

    has_masks = False
    native_size = None
    classes = ("red", "green", "blue", "mauve")
    labels = (0, 1, 2)

    def __len__(self):
        return 3


def test_classes_are_matched_by_name(work):
    """In another order than the training images have them."""
    test = work().test
    assert list(test.classes) == ["blue", "green", "red"]
    assert trained_class(test, ("red", "blue", "green", "mauve")).tolist() == [1, 2, 0]
    assert trained_class(test, ("blue", "green", "red")).tolist() == [0, 1, 2]


def test_training_images_are_those_of_the_pool(work):
    """Every second of 18 images, with its label and the name of its file."""
    source = work().train.pool.samples
    images = training_images(source, 9)
    assert len(images) == 9
    for i in range(9):
        pixels, label, mask = images.read(i)
        expected, wanted, _ = source.read(2 * i)
        assert (pixels == expected).all() and label == wanted and mask is None
        assert images.name(i) == source.name(2 * i)
