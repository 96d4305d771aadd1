"""How training images vary, against numpy on small pictures, and statistics over many draws."""

# ruff: noqa: NPY002  numpy's global generator is what timm draws from
from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.training import augment, start

DRAWS = 400


@pytest.fixture
def image():
    return np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def view_of(recipe):
    """``view_of(**settings)``: the view of a recipe, giving pixels 0..255 back where `raw`."""

    def make(raw=True, **settings):
        plan = recipe(**settings)
        model = start.make_model(plan, DigitScenes("train"))
        view = augment.training_view(plan, model)
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (lambda image: ((view(image) * std + mean) * 255).permute(1, 2, 0).numpy()) if raw else view

    return make


def drawn(view, image, times=DRAWS):
    for i in range(times):
        with augment.drawn_for(5, i):
            yield view(image)


def test_without_augmentation_it_is_the_geometry_of_a_test_image(recipe, view_of, image):
    model = start.make_model(recipe(), DigitScenes("train"))
    expected, _ = Geometry.of(model, DigitScenes("test"))(image)
    torch.testing.assert_close(view_of(raw=False)(image), expected, rtol=0, atol=1e-6)


def test_crop_cuts_from_the_image_padded_by_an_eighth(view_of, image):
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    places = {(r, c): padded[r : r + 32, c : c + 32] for r in range(9) for c in range(9)}
    found = []
    for cut in drawn(view_of(crop="padded"), image):
        (place,) = [place for place, window in places.items() if np.abs(window - cut).max() < 0.01]
        found.append(place)
    counts = np.zeros((9, 9))
    np.add.at(counts, tuple(np.transpose(found)), 1)
    assert (counts > 0).mean() > 0.9  # 400 draws from 81 places
    for axis in (0, 1):
        np.testing.assert_allclose(counts.sum(axis), DRAWS / 9, atol=4 * np.sqrt(DRAWS / 9))


def test_flip_mirrors_half(view_of, image):
    mirrored = [np.abs(image[:, ::-1] - out).max() < 0.01 for out in drawn(view_of(flip=True), image)]
    upright = [np.abs(image - out).max() < 0.01 for out in drawn(view_of(flip=True), image)]
    assert np.logical_xor(mirrored, upright).all()
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)


def test_random_resized_crop_takes_8_to_100_percent_of_the_area(view_of):
    """On a ramp along the columns a cut's contrast is its width; of two ramps, width and height."""
    rows, columns = np.mgrid[:100, :100] * 2.0
    ramps = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    sides = []
    for out in drawn(view_of(crop="random-resized"), ramps):
        assert out.shape == (32, 32, 3)
        gradients = out[16, -2, 1] - out[16, 1, 1], out[-2, 16, 0] - out[1, 16, 0]  # away from the border
        sides.append([gradient / 2 * 32 / 29 for gradient in gradients])
    width, height = np.transpose(sides)
    area, ratio = width * height / 100**2, width / height
    assert 0.06 < area.min() < 0.15
    assert 0.9 < area.max() < 1.1
    assert area.mean() == pytest.approx(0.54, abs=0.06)  # uniform in 0.08..1
    assert 0.68 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.45


def test_randaugment_is_torchvisions_or_timms(view_of, image, monkeypatch):
    """Two operations of magnitude 9 on the picture, and many different ones."""
    original = ImageOps.posterize
    torchvisions = v2.RandAugment(num_ops=2, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR)
    monkeypatch.setattr(ImageOps, "posterize", lambda picture, bits: original(picture, max(bits, 1)))
    grey = (124, 116, 104)  # ImageNet's mean
    timms = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 14, "img_mean": grey})
    for words, transform in (("torchvision", torchvisions), ("rand-m9-mstd0.5-inc1", timms)):
        view, kinds = view_of(randaugment=words), set()
        for i, found in enumerate(drawn(view, image, 60)):
            with augment.drawn_for(5, i):
                expected = np.array(transform(Image.fromarray(image)))
            np.testing.assert_allclose(found, expected, atol=0.01)
            kinds.add(expected.tobytes())
        assert len(kinds) > 30


@pytest.mark.parametrize(
    "words",
    ["", "yes", "rand-x9", "rand-m", "rand-mabc", "rand-m9-tfoo", "rand-m9-nX", "augmix-m3", "rand-mstdinf", "rand--"],
)
def test_words_that_timm_does_not_know(view_of, words):
    with pytest.raises(UserError, match="randaugment must be torchvision or timm's words, .* got"):
        view_of(randaugment=words)


@pytest.mark.parametrize(
    "words", ["rand", "rand-m9-n3-p0.5", "rand-n2-tweights", "rand-t3a-mmax9", "rand-m10-inc1-n9", "rand-m0-n9"]
)
def test_words_that_timm_knows(view_of, image, words):
    """Also at the ends of the scale, where timm posterises to no bits at all and Pillow raises."""
    for out in drawn(view_of(randaugment=words), image, 20):
        assert out.shape == (32, 32, 3)


def test_erasing_blanks_a_rectangle_after_normalising(view_of, image):
    """Zero after the normalisation, the mean colour: nothing else may be exactly zero."""
    view = view_of(raw=False, erase=0.25)
    plain = view_of(raw=False)(image)
    areas = []
    for out in drawn(view, image):
        erased = (out != plain).any(0)
        if erased.any():
            rows, columns = (np.flatnonzero(erased.numpy().any(axis)) for axis in (1, 0))
            assert erased.sum() == len(rows) * len(columns)
            assert (out[:, erased] == 0).all()
        areas.append(erased.float().mean().item())
    hit = np.array(areas) > 0
    assert hit.mean() == pytest.approx(0.25, abs=0.07)
    assert min(np.array(areas)[hit]) > 0.015 and max(areas) < 0.36  # 0.02..0.33 of the area


def test_the_order_is_crop_flip_randaugment_erase(view_of, image, monkeypatch):
    order = []

    def noted(name, returned):
        def make(*args, **kwargs):
            return lambda x: order.append(name) or (torch.zeros_like(x) if returned else x)

        return make

    for name in ("RandomResizedCrop", "RandomHorizontalFlip", "RandAugment"):
        monkeypatch.setattr(augment.v2, name, noted(name, False))
    monkeypatch.setattr(augment.v2, "RandomErasing", noted("RandomErasing", True))
    view = view_of(raw=False, crop="random-resized", flip=True, randaugment="torchvision", erase=0.1)
    assert (view(image) == 0).all()  # nothing comes after erasing
    assert order == ["RandomResizedCrop", "RandomHorizontalFlip", "RandAugment", "RandomErasing"]


@pytest.mark.parametrize("crop", ["none", "padded"])
@pytest.mark.parametrize("size", [(40, 40), (24, 24), (32, 40), (1, 1)])
def test_an_image_of_another_size(view_of, crop, size):
    with pytest.raises(UserError, match=f"an image of {size[0]} x {size[1]} pixels for a model of 32 x 32: use crop="):
        view_of(crop=crop)(np.zeros((*size, 3), np.uint8))


def test_draws_depend_on_the_numbers_alone_and_leave_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before, found = states(), []
    for numbers in ((1, 2), (1, 2), (1, 3), (2, 2)):
        with augment.drawn_for(*numbers):
            found.append(draw())
        assert states() == before
    assert found[0] == found[1]
    assert all(len({triple[i] for triple in found}) == 3 for i in range(3))
    with contextlib.suppress(KeyError), augment.drawn_for(9):
        draw()
        raise KeyError
    assert states() == before


def test_no_mixing_by_default(recipe):
    assert augment.mixing(recipe(), 10) is None


@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_targets_are_mixed_as_the_images_are_and_smoothed_once(recipe, alphas):
    """Image i is constant i: its mixture with image 7 - i tells the share, which the target must have."""
    labels = torch.arange(8)
    smooth = 0.8 * F.one_hot(labels, 10) + 0.2 / 10
    kinds = set()
    for i in range(60):
        images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).clone()
        with augment.drawn_for(i):
            mixed, targets = augment.mixing(recipe(**alphas, label_smoothing=0.2), 10)(images, labels)
        share = (mixed[0].mean() / 7).item()  # of image 7 in image 0
        torch.testing.assert_close(targets, (1 - share) * smooth + share * smooth.flip(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        if 0 < share < 1:
            kinds.add("cutmix" if len(mixed[0].unique()) == 2 else "mixup")
    assert kinds == set(alphas)
