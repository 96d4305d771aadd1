"""Decoding of images and masks, and the even spread of a limit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bvit_interp.data.samples import Subset, evenly_spaced, read_image, read_mask, write_mask
from bvit_interp.errors import DataError, UserError
from bvit_interp.vocabulary import IGNORE


@pytest.mark.parametrize(
    ("mode", "stored", "seen"),
    [("L", 5, 5), ("RGBA", (10, 20, 30, 0), (10, 20, 30)), ("P", 0, 0), ("1", 1, 255)],
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, stored, seen):
    Image.new(mode, (3, 2), stored).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", "x")
    assert image.shape == (2, 3, 3)
    assert image.dtype == np.uint8
    assert (image == seen).all()


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg", "x").max() < 3


def test_a_jpeg_cut_anywhere_is_named():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    content = buffer.getvalue()
    assert read_image(content, "whole").shape == (40, 40, 3)
    for cut in (0, 1, 10, 100, 300, 700, len(content) // 2, len(content) - 200):
        with pytest.raises(DataError, match=r"cat/x\.JPEG: the image cannot be read") as caught:
            read_image(content[:cut], "cat/x.JPEG")
        assert "\n" not in str(caught.value)


def test_a_broken_png_and_a_missing_file_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    for damaged in (content[:60], content[:500] + bytes(20) + content[520:]):
        with pytest.raises(DataError, match=r"x\.png: the image cannot be read"):
            read_image(damaged, "x.png")
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        read_mask(tmp_path / "gone.png")


def test_mask_ids_are_red_plus_256_green(tmp_path):
    pixels = [
        [(0, 0, 0), (1, 0, 0), (255, 0, 0)],
        [(0, 1, 0), (149, 3, 0), (151, 3, 0)],
        [(232, 3, 0)] * 3,
    ]
    Image.fromarray(np.array(pixels, np.uint8)).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png")
    assert mask.tolist() == [[0, 1, 255], [256, 917, 919], [IGNORE, IGNORE, IGNORE]]
    assert mask.dtype == np.int32


def test_written_masks_carry_the_same_bytes(tmp_path):
    write_mask(np.array([[0, 917, 1000]], np.int32), tmp_path / "m.png")
    assert np.array(Image.open(tmp_path / "m.png")).tolist() == [
        [[0, 0, 0], [149, 3, 0], [232, 3, 0]]
    ]


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG")]
)
def test_a_mask_that_is_no_rgb_png_is_refused(tmp_path, mode, kind):
    Image.new(mode, (3, 3)).save(tmp_path / "m.png", kind)
    with pytest.raises(
        DataError, match=rf"m\.png: a mask is an RGB PNG, this is {kind} in mode {mode}"
    ):
        read_mask(tmp_path / "m.png")


def test_a_limit_is_spread_evenly():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(100, 10) == list(range(0, 100, 10))
    assert evenly_spaced(3, None) == evenly_spaced(3, 3) == evenly_spaced(3, 10**9) == [0, 1, 2]
    with pytest.raises(UserError, match="at least 1, got 0"):
        evenly_spaced(3, 0)


def test_a_subset_is_a_set_of_its_own():
    class Set:
        classes, native_size, has_masks = ("a", "b"), 8, False

        def name(self, i):
            return f"image-{i}"

        def read(self, i):
            return np.full((8, 8, 3), i, np.uint8), i % 2, None

    some = Subset(Set(), [4, 1])
    assert len(some) == 2
    assert (some.classes, some.native_size, some.has_masks) == (("a", "b"), 8, False)
    assert [some.name(i) for i in range(2)] == ["image-4", "image-1"]
    image, label, mask = some.read(1)
    assert (image.max(), label, mask) == (1, 1, None)
