"""Images that are read once and kept on a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import DataError
from bvit_interp.training.loop import preload


class Pictures:
    """43 random pictures of 24 x 32 pixels, and the number of times one was read."""

    classes, native_size, has_masks = tuple("abcdefghij"), None, False

    def __init__(self):
        shape = (43, 24, 32, 3)
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.reads = 0

    def __len__(self):
        return len(self.pixels)

    def name(self, i):
        return f"picture {i}"

    def read(self, i):
        self.reads += 1
        return self.pixels[i], i * 7 % 10, None


def test_pictures_that_do_not_fit_are_not_read(monkeypatch):
    samples = Pictures()
    monkeypatch.setattr(preload, "HOST_BYTES", samples.pixels.nbytes - 1)
    assert preload.images_on_device(samples, "cpu") is None
    assert samples.reads < 43 + 5  # for the fingerprint, and one for its size
    monkeypatch.setattr(preload, "HOST_BYTES", samples.pixels.nbytes)
    kept = preload.images_on_device(samples, "cpu")
    np.testing.assert_array_equal(kept.images.permute(0, 2, 3, 1), samples.pixels)
    assert kept.images.dtype == torch.uint8
    assert kept.labels.tolist() == [i * 7 % 10 for i in range(43)]


@pytest.mark.parametrize("block", [7, 43, 44])
def test_blocks_of_images_hold_each_image_once(monkeypatch, block):
    monkeypatch.setattr(preload, "_BLOCK", block)
    samples = Pictures()
    samples.pixels = samples.pixels + np.uint8(block)  # other pixels: nothing is shared
    kept = preload.images_on_device(samples, "cpu")
    np.testing.assert_array_equal(kept.images.permute(0, 2, 3, 1), samples.pixels)


def test_a_picture_of_another_size_than_required_is_named():
    with pytest.raises(DataError, match="picture 0: an image of 24 x 32 pixels for a model of 32"):
        preload.images_on_device(Pictures(), "cpu", required_size=(32, 32))


def test_digits_s_is_not_kept_because_each_epoch_draws_other_scenes():
    assert preload.images_on_device(DigitScenes("train", length=40), "cpu") is None


@pytest.mark.parametrize(
    ("device", "cores", "workers", "expected"),
    [("cpu", 32, 3, 3), ("cuda", 32, 3, 12), ("cuda", 32, 20, 20), ("cuda", 6, 3, 5)],
)
def test_a_gpu_is_given_more_readers_if_there_are_cores(
    recipe, monkeypatch, device, cores, workers, expected
):
    monkeypatch.setattr(preload.os, "cpu_count", lambda: cores)
    assert preload.reader_processes(recipe(workers=workers), device) == expected


def test_the_fingerprint_sees_images_labels_and_number():
    class Other(DigitScenes):
        def __init__(self, change, **kwargs):
            super().__init__(**kwargs)
            self.change = change

        def read(self, i):
            image, label, mask = super().read(i)
            return (
                (255 - image if self.change == "image" else image),
                label + (self.change == "label"),
                mask,
            )

    def fingerprint(change="", split="train", length=40):
        return preload.fingerprint(Other(change, split=split, length=length))

    same = preload.fingerprint(DigitScenes("train", length=40))
    assert fingerprint() == same
    others = [
        fingerprint("image"),
        fingerprint("label"),
        fingerprint(length=41),
        fingerprint(split="test"),
    ]
    assert len({same, *others}) == 5
