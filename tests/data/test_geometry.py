"""Resize, crop and normalisation, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bvit_interp.data.digits import DigitScenes
from bvit_interp.data.folders import ImageFolderSamples
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import UserError


def plain(size: int, resize: int) -> Geometry:
    return Geometry((size, size), resize, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")


def test_crop_and_normalisation_by_hand():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    mask = np.arange(24, dtype=np.int32).reshape(4, 6)
    view, ids = Geometry((2, 2), 4, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0), "bilinear")(image, mask)
    assert ids.tolist() == [[8, 9], [14, 15]]
    assert ids.dtype == torch.int64
    red, blue = (image[1:3, 2:4, channel] / 255 for channel in (0, 2))
    np.testing.assert_allclose(view[0].numpy(), (red - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_allclose(view[2].numpy(), blue / 2, atol=1e-6)
    assert type(view) is type(ids) is torch.Tensor
    assert view.dtype == torch.float32


def test_masks_are_enlarged_to_the_nearest_pixel():
    mask = np.array([[0, 917], [1000, 1]], np.int32)
    _, ids = plain(4, 4)(np.zeros((2, 2, 3), np.uint8), mask)
    assert ids.tolist() == [
        [0, 0, 917, 917],
        [0, 0, 917, 917],
        [1000, 1000, 1, 1],
        [1000, 1000, 1, 1],
    ]


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        (6, 4, [0, 2, 3, 5]),  # centres 0.75, 2.25, 3.75, 5.25; the legacy nearest takes 0, 1, 3, 4
        # the middle of every three; the legacy nearest takes the first, 0, 3, 6, 9
        (
            12,
            4,
            [1, 4, 7, 10],
        ),
        # centres 1, 3, 5, 7 lie between two pixels: the upper one; legacy 0, 2, 4, 6
        (
            8,
            4,
            [1, 3, 5, 7],
        ),
    ],
)
def test_masks_are_reduced_to_the_pixel_under_each_centre(old, new, nearest):
    mask = np.arange(old * old, dtype=np.int32).reshape(old, old)
    _, ids = plain(new, new)(np.zeros((old, old, 3), np.uint8), mask)
    np.testing.assert_array_equal(ids.numpy(), mask[np.ix_(nearest, nearest)])


@pytest.mark.parametrize(("old", "new"), [(6, 4), (12, 4), (336, 224), (300, 224)])
def test_a_symmetric_mask_stays_symmetric(old, new):
    half = np.random.default_rng(0).choice(np.array([0, 917, 1000], np.int32), (old, old // 2))
    mask = np.concatenate([half, half[:, ::-1]], axis=1)
    _, ids = plain(new, new)(np.zeros((old, old, 3), np.uint8), mask)
    assert torch.equal(ids, ids.flip(1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_no_new_ids_are_invented(interpolation):
    mask = np.random.default_rng(0).choice(np.array([0, 917, 1000], np.int32), (333, 501))
    geometry = Geometry((224, 224), 256, (0.5,) * 3, (0.5,) * 3, interpolation)
    view, ids = geometry(np.zeros((333, 501, 3), np.uint8), mask)
    assert set(ids.unique().tolist()) == {0, 917, 1000}
    assert view.shape == (3, 224, 224)
    assert ids.shape == (224, 224)


@pytest.mark.parametrize("shape", [(300, 500), (640, 480), (150, 120)])
def test_image_and_mask_stay_aligned(shape):
    """A white disc and its mask must cover the same pixels, but for its blurred rim."""
    rows, cols = np.mgrid[: shape[0], : shape[1]]
    disc = np.hypot(rows - shape[0] / 2, cols - shape[1] / 2) < min(shape) / 4
    image = np.repeat(disc[..., None] * np.uint8(255), 3, axis=2)
    view, ids = plain(224, 256)(image, disc.astype(np.int32))
    assert 0.15 < (ids == 1).float().mean() < 0.35
    assert ((view[0] > 0.5) == (ids == 1)).float().mean() > 0.985


def test_a_set_at_the_models_size_is_not_resampled(tiny):
    samples = DigitScenes()
    geometry = Geometry.of(tiny, samples)
    assert (geometry.size, geometry.resize) == ((32, 32), 32)
    assert Geometry.of(tiny, samples, resize=36).resize == 36  # unless asked for
    image, _, mask = samples.read(0)
    view, ids = geometry(image, mask)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (geometry.mean, geometry.std))
    pixels = ((view * std + mean) * 255).round().permute(1, 2, 0)
    np.testing.assert_array_equal(pixels.numpy(), image)
    np.testing.assert_array_equal(ids.numpy(), mask)


def test_resize_follows_crop_pct_only_for_a_bvit(make, masked_set):
    folder = ImageFolderSamples(masked_set / "validation")
    recurrent, stacked = make(), make(name="vit_tiny_patch16_224", depth=1)
    for model in (recurrent, stacked):
        assert Geometry.of(model, folder).resize == 37  # 32 * 256 / 224 = 36.6
    recurrent.pretrained_cfg["crop_pct"] = stacked.pretrained_cfg["crop_pct"] = 0.8
    assert (Geometry.of(recurrent, folder).resize, Geometry.of(stacked, folder).resize) == (40, 37)
    with_digits = Geometry.of(make(img_size=64), DigitScenes())  # 32 px scenes, 64 px model
    assert with_digits.resize == 73


def test_normalisation_is_the_checkpoints_else_imagenets(make, masked_set):
    folder = ImageFolderSamples(masked_set / "validation")
    model = make(name="vit_tiny_patch16_224", depth=1)
    geometry = Geometry.of(model, folder)
    assert geometry.mean == (0.5, 0.5, 0.5)
    assert geometry.interpolation == "bicubic"
    model.pretrained_cfg = {}
    geometry = Geometry.of(model, folder)
    assert geometry.mean == (0.485, 0.456, 0.406)
    assert geometry.std == (0.229, 0.224, 0.225)


def test_equal_geometries_are_one_key(tiny, tiny_te):
    assert len({Geometry.of(tiny, DigitScenes()), Geometry.of(tiny_te, DigitScenes())}) == 1


def test_resize_below_the_size_is_refused(tiny):
    with pytest.raises(UserError, match="at least the model's 32 pixels, got 31"):
        Geometry.of(tiny, DigitScenes(), resize=31)


# ---- models of one channel -----------------------------------------------------------------------


def test_a_model_of_one_channel_sees_luma(make):
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (10, 10, 10)]]
    luma = np.array([[76, 150], [29, 10]])  # 0.299 R + 0.587 G + 0.114 B, to the nearest
    mask = np.array([[0, 1], [1, 0]], np.int32)
    geometry = Geometry((2, 2), 2, (0.5,), (0.25,), "bilinear")
    view, ids = geometry(np.array(colours, np.uint8), mask)
    assert view.shape == (1, 2, 2)
    np.testing.assert_allclose(view[0].numpy(), (luma / 255 - 0.5) / 0.25, atol=1e-6)
    np.testing.assert_array_equal(ids.numpy(), mask)
    shown = geometry.to_pixels(view[None]).numpy()
    np.testing.assert_array_equal(shown, np.repeat(luma[None, ..., None], 3, axis=-1))


def test_normalisation_has_a_number_per_channel(make):
    grey, scenes = make(in_chans=1), DigitScenes()
    geometry = Geometry.of(grey, scenes)  # the checkpoint has those of three colours
    assert geometry.mean == pytest.approx((0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406,))
    assert geometry.std == pytest.approx((0.299 * 0.229 + 0.587 * 0.224 + 0.114 * 0.225,))
    for model, channels in ((grey, 1), (make(), 3)):
        model.pretrained_cfg |= {"mean": [0.1307], "std": [0.3081]}
        geometry = Geometry.of(model, scenes)
        assert (geometry.mean, geometry.std) == ((0.1307,) * channels, (0.3081,) * channels)
        pixels = scenes.read(0)[0]
        shown = geometry.to_pixels(geometry(pixels)[0])
        assert shown.shape == (32, 32, 3)
        assert channels == 1 or np.array_equal(shown.numpy(), pixels)


def test_other_numbers_of_channels_are_refused(make):
    with pytest.raises(UserError, match="2 channels") as refused:
        Geometry.of(make(in_chans=2), DigitScenes())
    assert "\n" not in str(refused.value)
