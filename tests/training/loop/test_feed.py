"""Batches from the device and from workers are the same.

And the same whether the images lie on the device or are read as they are needed.
"""

from __future__ import annotations

import gc
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bvit_interp.errors import DataError, UserError
from bvit_interp.training.loop import epochs, feed, preload


class Pictures:
    """Random pictures in memory, of 32 pixels but for one of another size or one that cannot be
    read."""

    classes, native_size, has_masks = tuple("abcdefghij"), None, False

    def __init__(self, length=43, size=(32, 32), odd=None, broken=None, seed=0):
        self.pixels = np.random.default_rng(seed).integers(
            0, 256, (length, *size, 3), dtype=np.uint8
        )
        self.odd, self.broken, self.reads = odd, broken, 0

    def __len__(self):
        return len(self.pixels)

    def name(self, i):
        return f"picture {i}"

    def read(self, i):
        self.reads += 1
        if i == self.broken:
            raise DataError(f"picture {i} cannot be read")
        return self.pixels[i][:30] if i == self.odd else self.pixels[i], i * 7 % 10, None


MODEL = SimpleNamespace(
    pretrained_cfg={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    num_classes=10,
    patch_embed=SimpleNamespace(img_size=(32, 32)),
)
GREY = 1.01 / 255 / 0.224  # a grey level after the normalisation, at most
EVERYTHING = {
    "flip": True,
    "erase": 0.5,
    "mixup": 0.2,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "images_per_epoch": None,
}
PLANS = {
    "plain": {"images_per_epoch": None},
    "whole": {"randaugment": "torchvision", **EVERYTHING},
    "padded": {"crop": "padded", "randaugment": "rand-m9-mstd0.5-inc1", **EVERYTHING},
    "resized": {"crop": "random-resized", **EVERYTHING},
}


def taken(plan, samples, epoch=1, first=0):
    """The batches of a feed, and whether its images lay on the device."""
    made = feed.Feed(plan, samples, MODEL, "cpu")
    return [*made.epoch(epoch, first)], made.on_device is not None


def assert_same(found, expected, within=0.0):
    assert len(found) == len(expected)
    for (images, targets), (others, wanted) in zip(found, expected, strict=True):
        torch.testing.assert_close(images, others, rtol=0, atol=within)
        assert torch.equal(targets, wanted)


@pytest.fixture
def streamed(monkeypatch):
    """``streamed(plan, samples, ...)``: as `taken`, with no room for the images on the device."""

    def take(*given, **named):
        with monkeypatch.context() as patch:
            patch.setattr(preload, "HOST_BYTES", 0)
            batches, resident = taken(*given, **named)
        assert not resident
        return batches

    return take


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("first", [0, 3])
def test_images_on_the_device_are_shown_as_those_that_are_read(recipe, streamed, name, first):
    """Bit for bit where nothing is resized; where a batch is, within the grey level that it differs
    by from one."""
    plan, samples = recipe(**PLANS[name]), Pictures()
    found, resident = taken(plan, samples, first=first)
    assert resident and len(found) == 5 - first
    images, targets = found[0]
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), torch.float32)
    assert targets.shape == ((8,) if name == "plain" else (8, 10))
    assert_same(found, streamed(plan, samples, first=first), GREY if name == "resized" else 0.0)


@pytest.mark.parametrize("name", PLANS)
def test_batches_are_of_seed_and_epoch_and_not_of_where_it_resumes(recipe, streamed, name):
    plan, samples = recipe(**PLANS[name]), Pictures()
    for take in (lambda *given, **named: taken(*given, **named)[0], streamed):
        whole = take(plan, samples)
        assert_same(take(recipe(**PLANS[name], lr=7.0, epochs=9), samples, first=2), whole[2:])
        others = [take(plan, samples, epoch=2), take(recipe(**PLANS[name], seed=1), samples)]
        for other in others:
            assert all(not torch.equal(a, b) for (a, _), (b, _) in zip(whole, other, strict=True))


@pytest.mark.parametrize("ends", [(5,), (2, 4, 5), (3, 5)])
@pytest.mark.parametrize("first", [0, 1, 2, 4])
def test_many_steps_at_once_are_those_steps(recipe, monkeypatch, ends, first):
    """As on a GPU; also where a run goes on within such a group."""
    for name, settings in PLANS.items():
        plan, samples = recipe(**settings), Pictures()
        expected, _ = taken(plan, samples)
        with monkeypatch.context() as patch:
            patch.setattr(epochs.Epoch, "group_ends", lambda *given: iter(ends))
            found, _ = taken(plan, samples, first=first)
        assert_same(found, expected[first:], GREY if name == "resized" else 0.0)


def test_a_long_epoch_augments_an_image_otherwise_each_time(recipe, streamed):
    plan, samples = (
        recipe(**PLANS["padded"] | {"images_per_epoch": 96, "mixup": 0.0, "cutmix": 0.0}),
        Pictures(32),
    )
    found, _ = taken(plan, samples)
    images = torch.cat([images for images, _ in found])
    assert len(images) == 96 and len(torch.unique(images.flatten(1), dim=0)) == 96
    assert_same(found, streamed(plan, samples))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one_on_the_device_too(recipe, monkeypatch, streamed, world):
    """But for Mixup, whose partners are within a process's part."""
    plan = recipe(**PLANS["padded"] | {"mixup": 0.0, "cutmix": 0.0})
    samples = Pictures()
    whole, _ = taken(plan, samples)
    for rank in range(world):
        monkeypatch.setattr(epochs, "rank_and_world", lambda rank=rank: (rank, world))
        wanted = [(images[rank::world], labels[rank::world]) for images, labels in whole]
        found, resident = taken(plan, samples)
        assert resident
        assert_same(found, wanted)
        assert_same(streamed(plan, samples), wanted)
        mixed = recipe(**PLANS["padded"])
        assert_same(streamed(mixed, samples), taken(mixed, samples)[0])


@pytest.mark.parametrize("odd", [0, 1, 39])
def test_images_of_several_sizes_are_read_as_they_are_needed(recipe, odd):
    samples = Pictures(40, odd=odd)
    found, resident = taken(recipe(**PLANS["resized"]), samples)
    assert not resident
    assert all(images.shape == (8, 3, 32, 32) for images, _ in found)
    with pytest.raises(
        UserError,
        match="an image of 30 x 32 pixels for a model of 32 x 32: use crop=random-resized",
    ):
        taken(recipe(**PLANS["padded"]), samples)


def test_runs_on_the_same_images_share_them_and_the_last_one_frees_them(recipe):
    one, two = (feed.Feed(recipe(seed=seed), Pictures(), MODEL, "cpu") for seed in (0, 1))
    other = feed.Feed(recipe(), Pictures(seed=1), MODEL, "cpu")
    assert one.on_device is two.on_device
    assert other.on_device is not one.on_device
    images = weakref.ref(one.on_device.images)
    del one
    gc.collect()
    assert images() is not None
    del two
    gc.collect()
    assert images() is None


@pytest.mark.parametrize("broken", [0, 7])
def test_a_picture_that_cannot_be_read_is_one_line_or_passed_over(recipe, streamed, broken):
    samples = Pictures(broken=broken)
    with pytest.raises(DataError, match=f"^picture {broken} cannot be read$"):
        feed.Feed(recipe(**PLANS["plain"]), samples, MODEL, "cpu")
    plan = recipe(**PLANS["padded"], skip_corrupt=True)
    found, resident = taken(plan, samples)
    assert resident
    assert_same(found, streamed(plan, samples))


def test_what_is_drawn_for_pictures_leaves_the_global_generators_as_they_were(recipe):
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    taken(recipe(**PLANS["padded"]), Pictures())
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before  # noqa: NPY002


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_the_same_pictures(recipe, streamed, workers):
    settings, samples = PLANS["padded"], Pictures()
    assert_same(
        streamed(recipe(**settings, workers=workers), samples, first=1),
        streamed(recipe(**settings), samples)[1:],
    )
