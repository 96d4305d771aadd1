"""The order of an epoch's images, and batches read one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import DataError, UserError
from bvit_interp.training.loop import epochs
from bvit_interp.training.loop.draws import Draws


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
    return list(epochs.batches(epochs.Epoch(recipe, samples, view, epoch, 3), first, workers))


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
    epoch = epochs.Epoch(
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
        monkeypatch.setattr(epochs, "rank_and_world", lambda rank=rank: (rank, world))
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
        drawn = epochs.Epoch(plan, DigitScenes("train"), noisy, epoch, 3).samples
        assert (len(drawn), drawn.split, drawn.hardness) == (24, "train", hardness)
        seen += [drawn.name(i) for i in range(24)]
    assert len(set(seen)) == 96
    assert epochs.images_per_epoch(plan, DigitScenes("train")) == 24
    whole = DigitScenes("train", length=500)
    assert epochs.images_per_epoch(recipe(images_per_epoch=None), whole) == 500
    samples = Numbered(40)
    assert epochs.training_samples(plan, samples, 3) is samples


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


def test_groups_on_a_gpu_are_of_whole_batches_within_its_memory(recipe):
    samples = Numbered(2000)
    epoch = epochs.Epoch(recipe(images_per_epoch=None, batch_size=10), samples, noisy, 0, 3)
    gpu = torch.device("cuda")
    assert [*epoch.group_ends(torch.device("cpu"), (32, 32))] == [*range(1, 201)]
    assert [*epoch.group_ends(gpu, (8, 8))] == [200]  # 4,096 images at most
    assert [*epoch.group_ends(gpu, (224, 224))] == [*range(44, 200, 44), 200]  # 2**26 values
    assert [*epoch.group_ends(gpu, (9000, 9000))] == [*range(1, 201)]  # a batch at least


def test_an_old_run_is_continued_with_the_numbers_it_began_with(recipe):
    """The order is drawn for (seed, epoch), and numbers of images for (seed, epoch, 1)."""
    epoch = epochs.Epoch(recipe(seed=5, images_per_epoch=None), Numbered(40), noisy, 2, 8)
    np.testing.assert_array_equal(epoch.order, np.random.default_rng([5, 2]).permutation(40))
    np.testing.assert_array_equal(epoch.draws.table(3), Draws([5, 2, 1], 8).table(3))
