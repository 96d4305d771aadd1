"""digits-s is the same every time, and its splits share nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_images

from bvit_interp.data.digits import DigitScenes, _sources
from bvit_interp.errors import DataError


def test_scene_i_is_always_the_same():
    first, second, shifted = (
        DigitScenes("train"),
        DigitScenes("train"),
        DigitScenes("train", start=7),
    )
    for i in (0, 10, 3):  # in any order
        for a, b in zip(first.read(i + 7), second.read(i + 7), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(first.read(i + 7)[0], shifted.read(i)[0])
    assert first.name(7) == shifted.name(0)
    assert not np.array_equal(first.read(0)[0], first.read(1)[0])
    assert not np.array_equal(first.read(0)[0], DigitScenes("test").read(0)[0])


def test_the_mask_is_the_label_plus_one_on_some_ink():
    scenes = DigitScenes("test")
    for i in range(30):
        image, label, mask = scenes.read(i)
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert mask.shape == (32, 32)
        assert mask.dtype == np.int32
        assert set(np.unique(mask)) == {0, label + 1}
        assert 0.01 < (mask > 0).mean() < 0.5
    assert scenes.has_masks
    assert scenes.native_size == 32
    assert len(scenes) == 2000


def test_splits_share_no_digit_and_no_photograph_pixel():
    (train, train_labels, left), (test, test_labels, right) = _sources("train"), _sources("test")
    digits = load_digits()
    assert len(train) + len(test) == len(digits.images) == 1797
    assert not {d.tobytes() for d in train} & {d.tobytes() for d in test}
    counts = np.bincount(train_labels, minlength=10) + np.bincount(test_labels, minlength=10)
    np.testing.assert_array_equal(counts, np.bincount(digits.target))
    for photo, a, b in zip(load_sample_images().images, left, right, strict=True):
        np.testing.assert_array_equal(np.concatenate([a, b], axis=1), photo)


def test_unknown_split_names_the_valid_ones():
    with pytest.raises(DataError, match="no split 'val'; splits: train, test"):
        DigitScenes("val")
