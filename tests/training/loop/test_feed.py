"""What the model is shown: each image once an epoch, and the same on any number of workers and
processes.

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

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import DataError, UserError
from bvit_interp.training.loop import feed


class Numbered:
    """Image i is constant i but for a corner; labels count down."""

    classes = tuple("abcdefghij")
    native_size, has_masks = 8, False

    def __init__(self, length, broken=None):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def read(self, i):
        if i == self.broken:
            raise DataError(f"image {i} cannot be read")
        image = np.full((8, 8, 3), i, np.uint8)
        image[0, 0] = 255
        return image, 9 - i % 10, None


def noisy(image, draws):
    """A view that takes what was drawn for the image."""
    return torch.from_numpy(image).permute(2, 0, 1) + 0.2 * draws[:3].sum()


def shown(recipe, samples, epoch=0, first=0, workers=0, view=noisy):
    return list(feed.batches(feed.Epoch(recipe, samples, view, epoch, 3), first, workers))


def order(batches):
    """The images' numbers, in the order in which they come."""
    return torch.cat([images[:, 0, 4, 4].long() for images, _ in batches]).tolist()


def test_every_image_once_an_epoch_but_for_the_rest(recipe):
    batches = shown(recipe(images_per_epoch=None), Numbered(43))
    assert len(batches) == 5  # of 8: three images are left out
    assert all(
        images.shape == (8, 3, 8, 8) and labels.dtype == torch.int64 for images, labels in batches
    )
    seen = order(batches)
    assert len(set(seen)) == 40 and set(seen) <= set(range(43))
    assert seen != sorted(seen)
    assert torch.cat([labels for _, labels in batches]).tolist() == [9 - i % 10 for i in seen]


def test_a_long_epoch_shows_every_image_again_and_otherwise(recipe):
    batches = shown(recipe(images_per_epoch=48), Numbered(16))
    seen = order(batches)
    for start in (0, 16, 32):
        assert sorted(seen[start : start + 16]) == list(range(16))
    values = torch.cat([images[:, 0, 4, 4] for images, _ in batches]).tolist()
    assert len({round(value, 5) for value in values}) == 48


def test_order_and_pixels_are_of_seed_and_epoch(recipe):
    samples = Numbered(40)
    base = shown(recipe(seed=1), samples, epoch=2)
    again = shown(recipe(seed=1, lr=7.0, epochs=9, workers=3), samples, epoch=2)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(base, again, strict=True))
    for other in (shown(recipe(seed=1), samples, epoch=3), shown(recipe(seed=2), samples, epoch=2)):
        assert order(other) != order(base)
        pixels, others = (
            {
                int(image[0, 4, 4]): image[0, 4, 4].item()
                for images, _ in batches
                for image in images
            }
            for batches in (base, other)
        )
        assert all(pixels[i] != others[i] for i in range(40))  # augmented otherwise too


def test_an_image_is_augmented_for_itself_wherever_it_comes(recipe):
    """Row r of the epoch's table is of image r, and of its second view the row r further down by a
    whole set."""
    epoch = feed.Epoch(
        recipe(images_per_epoch=48),
        Numbered(20),
        lambda image, draws: torch.from_numpy(image),
        1,
        8,
    )
    table, seen = epoch.draws.table(60), dict.fromkeys(range(20), 0)
    for step in range(6):
        images, _, draws = epoch[step]
        for image, own in zip(images[:, 4, 4, 0].tolist(), draws.numpy(), strict=True):
            np.testing.assert_array_equal(own, table[20 * seen[image] + image])
            seen[image] += 1
    assert sorted(seen.values()) == [2] * 12 + [3] * 8


@pytest.mark.parametrize(("first", "workers"), [(0, 1), (3, 0), (2, 1)])
def test_workers_and_a_resumed_epoch_show_the_same(recipe, first, workers):
    expected = shown(recipe(), Numbered(40))[first:]
    found = shown(recipe(), Numbered(40), first=first, workers=workers)
    assert len(found) == 5 - first
    for (images, labels), (others, places) in zip(expected, found, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, places)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one(recipe, monkeypatch, world):
    whole = shown(recipe(), Numbered(40))
    shares = []
    for rank in range(world):
        monkeypatch.setattr(feed, "rank_and_world", lambda rank=rank: (rank, world))
        shares.append(shown(recipe(), Numbered(40)))
    for step, (images, labels) in enumerate(whole):
        for rank in range(world):
            assert torch.equal(shares[rank][step][0], images[rank::world])
            assert torch.equal(shares[rank][step][1], labels[rank::world])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_or_shown_is_one_line(recipe, workers):
    with pytest.raises(DataError, match=r"^image 7 cannot be read$"):
        shown(recipe(), Numbered(40, broken=7), workers=workers)

    def refusing(image, draws):
        raise UserError("an image of another size")

    with pytest.raises(UserError, match=r"^an image of another size$"):
        shown(recipe(), Numbered(40), workers=workers, view=refusing)


def test_digits_s_draws_fresh_scenes_in_every_epoch(recipe):
    plan = recipe(images_per_epoch=24, easy_epochs=1, fade_epochs=2)
    seen = []
    for epoch, hardness in ((0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0)):
        drawn = feed.Epoch(plan, DigitScenes("train"), noisy, epoch, 3).samples
        assert (len(drawn), drawn.split, drawn.hardness) == (24, "train", hardness)
        seen += [drawn.name(i) for i in range(24)]
    assert len(set(seen)) == 96
    assert feed.images_per_epoch(plan, DigitScenes("train")) == 24
    whole = DigitScenes("train", length=500)
    assert feed.images_per_epoch(recipe(images_per_epoch=None), whole) == 500
    samples = Numbered(40)
    assert feed.training_samples(plan, samples, 3) is samples


def test_a_batch_leaves_the_global_generators_as_they_were(recipe):
    def states():
        numpys = np.random.get_state()  # noqa: NPY002
        return random.getstate(), str(numpys), torch.get_rng_state().tolist()

    before = states()
    shown(recipe(), Numbered(40))
    assert states() == before
    with pytest.raises(DataError):
        shown(recipe(), Numbered(40, broken=7))
    assert states() == before


# ---- the feed: images on the device, or read as they are needed ------------------------------------------


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
    return [*made.epoch(epoch, first)], made.resident is not None


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
            patch.setattr(feed, "_HOST_BYTES", 0)
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
            patch.setattr(feed.Epoch, "groups", lambda *given: iter(ends))
            found, _ = taken(plan, samples, first=first)
        assert_same(found, expected[first:], GREY if name == "resized" else 0.0)


def test_groups_on_a_gpu_are_of_whole_batches_within_its_memory(recipe):
    samples = Numbered(2000)
    epoch = feed.Epoch(recipe(images_per_epoch=None, batch_size=10), samples, noisy, 0, 3)
    gpu = torch.device("cuda")
    assert [*epoch.groups(torch.device("cpu"), (32, 32))] == [*range(1, 201)]
    assert [*epoch.groups(gpu, (8, 8))] == [200]  # 4,096 images at most
    assert [*epoch.groups(gpu, (224, 224))] == [*range(44, 200, 44), 200]  # 2**26 values
    assert [*epoch.groups(gpu, (9000, 9000))] == [*range(1, 201)]  # a batch at least


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
        monkeypatch.setattr(feed, "rank_and_world", lambda rank=rank: (rank, world))
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


def test_what_does_not_fit_is_not_even_read(recipe, monkeypatch):
    samples = Pictures()
    monkeypatch.setattr(feed, "_HOST_BYTES", 43 * 32 * 32 * 3 - 1)
    assert feed.resident(samples, "cpu") is None
    assert samples.reads < 43 + 5  # for the fingerprint, and one for its size
    monkeypatch.setattr(feed, "_HOST_BYTES", 43 * 32 * 32 * 3)
    kept = feed.resident(samples, "cpu")
    np.testing.assert_array_equal(kept.images.permute(0, 2, 3, 1), samples.pixels)
    assert kept.images.dtype == torch.uint8 and kept.labels.tolist() == [
        i * 7 % 10 for i in range(43)
    ]
    assert (
        feed.resident(DigitScenes("train", length=40), "cpu") is None
    )  # each epoch draws other scenes


def test_runs_on_the_same_images_share_them_and_the_last_one_frees_them(recipe):
    one, two = (feed.Feed(recipe(seed=seed), Pictures(), MODEL, "cpu") for seed in (0, 1))
    other = feed.Feed(recipe(), Pictures(seed=1), MODEL, "cpu")
    assert one.resident is two.resident
    assert other.resident is not one.resident
    images = weakref.ref(one.resident.images)
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
