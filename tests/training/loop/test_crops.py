"""Crop, flip and resize of a batch against torchvision's, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from bvit_interp.training.loop import crops
from bvit_interp.training.loop.draws import Draws

SIZES = [(32, 32), (24, 40), (90, 70), (8, 5)]


@pytest.fixture(params=["cut", "_cut_by_matrices"], ids=["as on a CPU", "as on a GPU"])
def cut(request):
    """Both ways: torch's filter image by image, and two matrices for each."""
    return getattr(crops, request.param)


@pytest.fixture(scope="module")
def photos():
    """Two photographs and noise, ``(3, 3, 53, 67)`` uint8."""
    from sklearn.datasets import load_sample_images

    parts = [image[100:153, 200:267] for image in load_sample_images().images]
    noise = np.random.default_rng(0).integers(0, 256, (53, 67, 3), dtype=np.uint8)
    return torch.from_numpy(np.stack([*parts, noise])).permute(0, 3, 1, 2)


def random_places(n, high, wide, seed=0):
    """Boxes of any size from one pixel to the whole image."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, high + 1, n), rng.integers(1, wide + 1, n)
    return np.stack(
        [rng.integers(0, high - height + 1), rng.integers(0, wide - width + 1), height, width], 1
    )


def upright(n):
    return np.zeros(n, bool)


@pytest.mark.parametrize("size", SIZES)
def test_a_resized_box_is_torchvisions_of_a_picture_and_of_a_tensor(photos, size, cut):
    """Pillow rounds between the two axes, and torch's kernel in fixed point: both by a grey level
    at most."""
    boxes = np.concatenate(
        [random_places(60, 53, 67), [[0, 0, 53, 67], [52, 66, 1, 1], [0, 0, *size]]]
    )
    boxes[-1, 2:] = np.minimum(boxes[-1, 2:], (53, 67))
    images = photos[torch.arange(len(boxes)) % 3]
    found = cut(images, boxes, upright(len(boxes)), size)
    assert (found.shape, found.dtype) == ((len(boxes), 3, *size), torch.uint8)
    shifted = []
    for image, box, own in zip(images, boxes.tolist(), found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        by_pillow = np.array(
            tv.resized_crop(
                picture, *box, list(size), tv.InterpolationMode.BILINEAR, antialias=True
            )
        )
        by_torch = tv.resized_crop(
            image, *box, list(size), tv.InterpolationMode.BILINEAR, antialias=True
        )
        for expected in (torch.from_numpy(by_pillow).permute(2, 0, 1), by_torch):
            assert (own.int() - expected.int()).abs().max() <= 1, box
        shifted.append((own.int() - by_torch.roll(1, -1).int()).abs().float().mean() > 1)
    assert np.mean(shifted) > 0.9  # a shift by a pixel would be seen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flips", [upright(40), np.arange(40) % 3 == 0])
def test_a_batch_gives_each_image_what_it_gets_alone(photos, size, flips, cut):
    boxes, images = random_places(40, 53, 67, seed=1), photos[torch.arange(40) % 3]
    together = cut(images, boxes, flips, size)
    for i in range(40):
        alone = cut(images[i : i + 1], boxes[i : i + 1], flips[i : i + 1], size)[0]
        assert (alone.int() - together[i].int()).abs().max() <= 1


def test_mirrored_is_the_flipped_crop(photos, cut):
    boxes, images = random_places(30, 53, 67, seed=2), photos[torch.arange(30) % 3]
    straight = cut(images, boxes, upright(30), (32, 24))
    mirrored = cut(images, boxes, np.arange(30) % 2 == 0, (32, 24))
    assert (mirrored[::2].int() - straight[::2].flip(-1).int()).abs().max() <= 1
    assert torch.equal(mirrored[1::2], straight[1::2])
    whole = crops.whole_boxes(np.zeros((3, crops.WIDTH)), (53, 67))
    assert torch.equal(
        cut(photos, whole, np.array([True, False, True]), (53, 67))[[0, 2]], photos[[0, 2]].flip(-1)
    )
    assert torch.equal(cut(photos, whole, upright(3), (53, 67)), photos)


def test_a_box_of_the_size_wanted_is_cut_out_exactly(photos, cut):
    boxes = np.array([[5, 7, 20, 30]] * 3)
    assert torch.equal(cut(photos, boxes, upright(3), (20, 30)), photos[:, :, 5:25, 7:37])


def test_whole_images_are_given_back_without_work(photos):
    whole = crops.whole_boxes(np.zeros((3, crops.WIDTH)), (53, 67))
    assert crops.cut(photos, whole, upright(3), (53, 67)) is photos


@pytest.mark.parametrize("flipped", [False, True])
def test_what_lies_beyond_the_image_is_black_and_the_rest_exact(photos, flipped, cut):
    images = photos[torch.arange(80) % 3]
    boxes = crops.padded_boxes(Draws([1], crops.WIDTH).table(80), (53, 67))
    found = cut(images, boxes, np.full(80, flipped), (53, 67))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (6, 6), (6, 6)))
    for own, (top, left, *_), image in zip(found, boxes, padded, strict=True):
        window = image[:, top + 6 : top + 59, left + 6 : left + 73]
        np.testing.assert_array_equal(own, window[..., ::-1] if flipped else window)
    assert (
        {*boxes[:, 0]} == {*range(-6, 7)} == {*boxes[:, 1]}
    )  # an eighth of the height on every side, in both axes


def test_images_of_one_pixel_and_boxes_beside_them(cut):
    image = torch.full((1, 3, 1, 1), 200, dtype=torch.uint8)
    assert (cut(image, np.array([[0, 0, 1, 1]]), upright(1), (4, 5)) == 200).all()
    large = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    found = cut(large, np.array([[-4, 0, 8, 8], [0, 3, 8, 8]]), upright(2), (8, 8))
    assert (found[0, :, :4] == 0).all() and (found[0, :, 4:] == 200).all()
    assert (found[1, :, :, 5:] == 0).all() and (found[1, :, :, :5] == 200).all()


# ---- where the boxes lie


def torchvisions(size, n=4000):
    """Boxes of torchvision's own draws."""
    image = torch.empty(3, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return np.array(
            [
                RandomResizedCrop.get_params(image, list(crops.AREA), list(crops.RATIO))
                for _ in range(n)
            ]
        )


def measures(boxes, size):
    """Area and ratio, and the place within what is free, each a column that has one
    distribution."""
    top, left, height, width = boxes.T.astype(float)
    free_rows, free_columns = size[0] - height, size[1] - width
    return {
        "area": height * width / np.prod(size),
        "ratio": width / height,
        "row": (top + 0.5) / (free_rows + 1),
        "column": (left + 0.5) / (free_columns + 1),
        "height": height,
    }


@pytest.mark.parametrize("size", [(96, 96), (60, 100), (64, 32)])
def test_random_boxes_are_distributed_as_torchvisions(size):
    """Largest difference of the distribution functions 0.04: 1.8 standard errors' worth at 4,000
    and 20,000 draws."""
    draws = Draws([0], crops.WIDTH).table(20_000)
    boxes = crops.random_boxes(draws, size)
    assert boxes.dtype == np.int64
    assert (
        (boxes[:, :2] >= 0).all()
        and (boxes[:, 2:] >= 1).all()
        and (boxes[:, :2] + boxes[:, 2:] <= size).all()
    )
    ours, theirs = measures(boxes, size), measures(torchvisions(size), size)
    for name, values in ours.items():
        assert ks_2samp(values, theirs[name]).statistic < 0.04, name
    assert abs(np.corrcoef(ours["row"], ours["column"])[0, 1]) < 0.03


def test_that_comparison_tells_other_areas_ratios_and_places(monkeypatch):
    draws, size = Draws([0], crops.WIDTH).table(20_000), (96, 96)
    theirs = measures(torchvisions(size), size)

    def statistic(name):
        return ks_2samp(
            measures(crops.random_boxes(draws, size), size)[name], theirs[name]
        ).statistic

    monkeypatch.setattr(crops, "AREA", (0.15, 1.0))
    assert statistic("area") > 0.05
    monkeypatch.setattr(crops, "AREA", (0.08, 1.0))
    monkeypatch.setattr(crops, "RATIO", (0.65, 1 / 0.65))
    assert statistic("ratio") > 0.05
    monkeypatch.setattr(crops, "RATIO", (3 / 4, 4 / 3))
    draws[:, 2 * crops.TRIES] **= 1.3
    assert statistic("row") > 0.05


@pytest.mark.parametrize("size", [(20, 400), (400, 20), (300, 7)])
def test_where_no_box_fits_it_is_the_largest_in_the_middle(size):
    """Sizes at which ten tries of torchvision never fit."""
    boxes = crops.random_boxes(Draws([2], crops.WIDTH).table(50), size)
    expected = torchvisions(size, 50)
    assert len(np.unique(expected, axis=0)) == 1
    np.testing.assert_array_equal(boxes, expected)


def test_the_share_of_images_for_which_no_box_fits():
    """At 3 : 1, where some draws of torchvision have no try that fits."""
    size = (90, 30)
    ours, theirs = (
        (boxes[:, 2] == 40) & (boxes[:, 3] == 30) & (boxes[:, 0] == 25)
        for boxes in (
            crops.random_boxes(Draws([3], crops.WIDTH).table(20_000), size),
            torchvisions(size),
        )
    )
    assert 0.02 < theirs.mean() < 0.6
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.03)
