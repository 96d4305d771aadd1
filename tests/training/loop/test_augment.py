"""Augmentation against numpy on small pictures, and statistics of many draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomErasing

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError
from bvit_interp.training.loop import augment, build
from bvit_interp.training.loop.draws import Draws, seeded

DRAWS = 400


@pytest.fixture
def image():
    return np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def view_of(recipe):
    """``view_of(**settings)(image, times=DRAWS)``: a batch of views of one image by a recipe,
    ``(times, H, W, 3)`` pixels 0..255, or as the model is given them where not `raw`."""

    def make(raw=True, **settings):
        plan = recipe(**settings)
        model = build.make_model(plan, DigitScenes("train"))
        view = augment.Augmentation(plan, model)
        mean, std = (
            torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std")
        )

        def drawn(image, times=DRAWS):
            images = torch.from_numpy(image).permute(2, 0, 1).expand(times, -1, -1, -1)
            found = view(images, Draws([5], view.width).table(times))
            assert found.dtype == torch.float32
            return ((found * std + mean) * 255).permute(0, 2, 3, 1).numpy() if raw else found

        return drawn

    return make


def test_without_augmentation_it_is_the_geometry_of_a_test_image(recipe, view_of, image):
    model = build.make_model(recipe(), DigitScenes("train"))
    expected, _ = Geometry.of(model, DigitScenes("test"))(image)
    torch.testing.assert_close(
        view_of(raw=False)(image, 2), expected.expand(2, -1, -1, -1), rtol=0, atol=1e-6
    )


def test_crop_cuts_from_the_image_padded_by_an_eighth(view_of, image):
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    places = {(r, c): padded[r : r + 32, c : c + 32] for r in range(9) for c in range(9)}
    found = []
    for cut in view_of(crop="padded")(image):
        (place,) = [place for place, window in places.items() if np.abs(window - cut).max() < 0.01]
        found.append(place)
    counts = np.zeros((9, 9))
    np.add.at(counts, tuple(np.transpose(found)), 1)
    assert (counts > 0).mean() > 0.9  # 400 draws from 81 places
    for axis in (0, 1):
        np.testing.assert_allclose(counts.sum(axis), DRAWS / 9, atol=4 * np.sqrt(DRAWS / 9))


def test_flip_mirrors_half(view_of, image):
    found = view_of(flip=True)(image)
    mirrored = np.abs(image[:, ::-1] - found).max((1, 2, 3)) < 0.01
    upright = np.abs(image - found).max((1, 2, 3)) < 0.01
    assert np.logical_xor(mirrored, upright).all()
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)


def test_random_resized_crop_takes_8_to_100_percent_of_the_area(view_of):
    """On a ramp along the columns a cut's contrast is its width; of two ramps, width and height."""
    rows, columns = np.mgrid[:100, :100] * 2.0
    ramps = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    sides = []
    for out in view_of(crop="random-resized")(ramps):
        assert out.shape == (32, 32, 3)
        gradients = (
            out[16, -2, 1] - out[16, 1, 1],
            out[-2, 16, 0] - out[1, 16, 0],
        )  # away from the border
        sides.append([gradient / 2 * 32 / 29 for gradient in gradients])
    width, height = np.transpose(sides)
    area, ratio = width * height / 100**2, width / height
    assert 0.06 < area.min() < 0.15
    assert 0.9 < area.max() < 1.1
    assert area.mean() == pytest.approx(
        0.485, abs=0.05
    )  # torchvision's mean: of large areas fewer tries fit
    assert 0.68 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.45


@pytest.mark.parametrize(
    "words",
    [
        "",
        "yes",
        "rand-x9",
        "rand-m",
        "rand-mabc",
        "rand-m9-tfoo",
        "rand-m9-nX",
        "augmix-m3",
        "rand-mstdinf",
        "rand--",
        "rand-n2-tweights",
        "rand-t3a-mmax9",
    ],
)
def test_words_that_are_not_known(view_of, words):
    with pytest.raises(UserError, match="randaugment must be torchvision or timm's words .*, got"):
        view_of(randaugment=words)


@pytest.mark.parametrize(
    "words", ["torchvision", "rand", "rand-m9-n3-p0.5", "rand-m10-inc1-n9", "rand-m0-n9"]
)
def test_words_that_are_known(view_of, image, words):
    """Also at the ends of the scale, where timm posterises to no bits at all and Pillow raises."""
    found = view_of(randaugment=words)(image, 40)
    assert found.shape == (40, 32, 32, 3)
    assert (
        found.min() > -0.01 and found.max() < 255.01 and np.abs(found - found.round()).max() < 0.01
    )
    assert (
        len(np.unique(found.round(), axis=0)) > 15
    )  # of 40, half of timm's operations do not take place


def test_what_randaugment_moves_in_is_black_or_the_mean_colour(view_of):
    white = np.full((32, 32, 3), 255, np.uint8)
    for words, fill in (("torchvision", (0, 0, 0)), ("rand-m9-n1-p1.0", (124, 116, 104))):
        found = view_of(randaugment=words)(white).round()
        assert 0.05 < (found == fill).all(-1).any((1, 2)).mean() < 0.8


def test_erasing_blanks_a_rectangle_after_normalising(view_of, image):
    """Zero after the normalisation, the mean colour: nothing else may be exactly zero."""
    plain = view_of(raw=False)(image, 1)[0]
    areas = []
    for out in view_of(raw=False, erase=0.25)(image):
        erased = (out != plain).any(0)
        if erased.any():
            rows, columns = (np.flatnonzero(erased.numpy().any(axis)) for axis in (1, 0))
            assert erased.sum() == len(rows) * len(columns)
            assert (out[:, erased] == 0).all()
        areas.append(erased.float().mean().item())
    hit = np.array(areas) > 0
    assert hit.mean() == pytest.approx(0.25, abs=0.07)
    assert min(np.array(areas)[hit]) > 0.015 and max(areas) < 0.36  # 0.02..0.33 of the area


@pytest.mark.parametrize("size", [(32, 32), (60, 24)])
def test_erased_boxes_are_distributed_as_torchvisions(size):
    """Largest difference of the distribution functions of area, ratio and both places: 0.04 is p <
    0.001."""
    boxes = augment.erased_boxes(Draws([1], augment.ERASING_WIDTH).table(20_000), 1.0, size)
    with seeded(0):
        theirs = np.array(
            [
                RandomErasing.get_params(
                    torch.empty(3, *size), scale=(0.02, 0.33), ratio=(0.3, 3.3), value=[0]
                )[:4]
                for _ in range(3000)
            ]
        )
    theirs, erased = (
        theirs[theirs[:, 2] < size[0]],
        (theirs[:, 2] < size[0]).mean(),
    )  # the rest: no try fitted
    boxes, found = boxes[boxes[:, 2] > 0], (boxes[:, 2] > 0).mean()
    assert found == pytest.approx(erased, abs=0.02)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= size).all()

    def measures(top, left, height, width):
        rows, columns = (top + 0.5) / (size[0] - height + 1), (left + 0.5) / (size[1] - width + 1)
        return np.stack([height * width, height / width, rows, columns, height, width])

    ours, expected = (measures(*part.T) for part in (boxes, theirs))
    for one, other in zip(ours, expected, strict=True):
        assert ks_2samp(one, other).statistic < 0.04
    rows, columns = ours[2:4]
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.03


def test_whether_to_erase_does_not_depend_on_the_box():
    """Areas of the boxes that half of the images get are distributed as those of all images."""
    draws = Draws([1], augment.ERASING_WIDTH).table(20_000)
    every, half = (augment.erased_boxes(draws, share, (32, 32)) for share in (1.0, 0.5))
    is_erased = half[:, 2] > 0
    assert is_erased.mean() == pytest.approx(0.5 * (every[:, 2] > 0).mean(), abs=0.02)
    np.testing.assert_array_equal(half[is_erased], every[is_erased])
    areas = every[:, 2] * every[:, 3]
    assert ks_2samp(areas[is_erased], areas[~is_erased & (every[:, 2] > 0)]).statistic < 0.04


def test_the_order_is_crop_flip_randaugment_erase(view_of, image, monkeypatch):
    order, cut = [], augment.crops.cut

    class Noted:
        width = 0

        def __call__(self, images, draws):
            order.append("RandAugment")
            assert images.dtype == torch.uint8 and images.shape[2:] == (32, 32)
            return images

    def erased(draws, probability, size):
        order.append("erase")
        return np.tile([0, 0, 32, 32], (len(draws), 1))

    monkeypatch.setattr(
        augment.crops, "cut", lambda *given: order.append("crop and flip") or cut(*given)
    )
    monkeypatch.setattr(augment.randaugment, "like_torchvision", Noted)
    monkeypatch.setattr(augment, "erased_boxes", erased)
    view = view_of(
        raw=False, crop="random-resized", flip=True, randaugment="torchvision", erase=0.1
    )
    assert (view(image) == 0).all()  # nothing comes after erasing
    assert order == ["crop and flip", "RandAugment", "erase"]


def test_no_two_parts_draw_from_the_same_numbers(recipe):
    """Each column of an image's row is of one thing: changing those of one part leaves the others
    as they were."""
    plan = recipe(crop="padded", flip=True, randaugment="rand-m9-mstd0.5", erase=0.5, mixup=0.2)
    view = augment.Augmentation(plan, build.make_model(plan, DigitScenes("train")))
    given = {}

    class Row:
        """Notes which columns are asked for, by what part."""

        def __init__(self, columns):
            self.columns = columns

        def __getitem__(self, key):
            return Row(self.columns[key[1]])

    given["mixing"] = view.mixing_draws(Row(np.arange(view.width))).columns[:4]
    given["erasing"] = np.arange(view._erasing, view._erasing + 1 + 2 * 10 + 2)
    given["randaugment"] = np.arange(
        augment.crops.WIDTH, augment.crops.WIDTH + view.randaugment.width
    )
    given["crop"] = np.arange(augment.crops.WIDTH)
    columns = np.concatenate([*given.values()])
    assert len(np.unique(columns)) == len(columns) == view.width
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    )
    table = Draws([1], view.width).table(20)
    for part, own in given.items():
        other = table.copy()
        other[:, own] = Draws([2], len(own)).table(20)[:, : len(own)]
        assert torch.equal(view.cropped(images, table), view.cropped(images, other)) == (
            part != "crop"
        )
        mixing_unchanged = np.array_equal(view.mixing_draws(table), view.mixing_draws(other))
        assert mixing_unchanged == (part != "mixing")
        coloured, others = view.coloured(images, table), view.coloured(images, other)
        assert torch.equal(coloured, others) == (part in ("crop", "mixing"))
        assert torch.equal(coloured == 0, others == 0) == (part != "erasing")


@pytest.mark.parametrize("crop", ["none", "padded"])
@pytest.mark.parametrize("size", [(40, 40), (24, 24), (32, 40), (1, 1)])
def test_an_image_of_another_size(view_of, crop, size):
    with pytest.raises(
        UserError,
        match=f"an image of {size[0]} x {size[1]} pixels for a model of 32 x 32: use crop=",
    ):
        view_of(crop=crop)(np.zeros((*size, 3), np.uint8))
