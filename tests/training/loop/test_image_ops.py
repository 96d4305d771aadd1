"""Each operation of RandAugment against Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode, v2

from bvit_interp.training.loop import image_ops, randaugment

FILL = (124, 116, 104)


@pytest.fixture(scope="module")
def photos():
    """Two photographs, one of them dark, a ramp, noise and one grey value, ``(5, 3, 40, 48)``
    uint8."""
    from sklearn.datasets import load_sample_images

    first, second = (image[100:140, 200:248] for image in load_sample_images().images)
    ramp = np.broadcast_to(np.linspace(20, 230, 48).astype(np.uint8)[None, :, None], (40, 48, 3))
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    flat = np.full((40, 48, 3), 77, np.uint8)
    return torch.from_numpy(np.stack([first, second // 4, ramp, noise, flat])).permute(0, 3, 1, 2)


def by_pillow(images, operation):
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return torch.stack(
        [torch.from_numpy(np.array(operation(picture))).permute(2, 0, 1) for picture in pictures]
    )


def torchvisions(name, magnitude):
    transform = v2.RandAugment(interpolation=InterpolationMode.BILINEAR)
    return lambda picture: transform._apply_image_or_video_transform(
        picture, name, magnitude, interpolation=InterpolationMode.BILINEAR, fill={Image.Image: None}
    )


SIGNED = {"ShearX": 0.09, "ShearY": 0.09, "TranslateX": 6.0, "TranslateY": 5.0, "Rotate": 9.0}


FACTORS = {"Brightness": 0.27, "Color": 0.27, "Contrast": 0.27, "Sharpness": 0.27}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", [*SIGNED, *FACTORS])
def test_a_signed_operation_is_torchvisions(photos, name, sign):
    """torchvision is told +-m; ours is given what its table makes of strength 9 / 30 and the
    sign."""
    size = tuple(photos.shape[2:])
    given = randaugment._TORCHVISION[name](np.full(5, 0.3), np.full(5, float(sign)), size)
    if name.startswith("Translate"):
        side = size[1] if name == "TranslateX" else size[0]
        magnitude = sign * float(int(150 / 331 * side * 0.3))
    else:
        magnitude = sign * (SIGNED | FACTORS)[name]
    expected = by_pillow(photos, torchvisions(name, magnitude)).float()
    found = image_ops.apply(photos, [name] * 5, given, (0, 0, 0)).float()
    difference = (found - expected).abs()
    assert difference.max() <= 1
    assert difference.mean() < 0.01
    other = image_ops.apply(
        photos,
        [name] * 5,
        np.where(given == 0, 1, 2 - given if name in FACTORS else -given),
        (0, 0, 0),
    ).float()
    assert (other - expected).abs().mean() > 1  # the other sign is another image


@pytest.mark.parametrize(
    ("name", "magnitude", "operation"),
    [
        ("Posterize", 3, lambda p: ImageOps.posterize(p, 3)),
        ("Posterize", 7, lambda p: ImageOps.posterize(p, 7)),
        ("Posterize", 8, lambda p: p),
        ("Solarize", 178.5, lambda p: ImageOps.solarize(p, 178.5)),
        ("Solarize", 25, lambda p: ImageOps.solarize(p, 25)),
        ("Invert", 0, ImageOps.invert),
        ("AutoContrast", 0, ImageOps.autocontrast),
        ("Equalize", 0, ImageOps.equalize),
        ("Brightness", 1.9, lambda p: ImageEnhance.Brightness(p).enhance(1.9)),
        ("Contrast", 0.1, lambda p: ImageEnhance.Contrast(p).enhance(0.1)),
        ("Sharpness", 1.9, lambda p: ImageEnhance.Sharpness(p).enhance(1.9)),
        ("Color", 0.1, lambda p: ImageEnhance.Color(p).enhance(0.1)),
        (
            "SolarizeAdd",
            110,
            lambda p: p.point([min(255, i + 110) if i < 128 else i for i in range(256)] * 3),
        ),
    ],
)
def test_an_operation_on_values_is_pillows(photos, name, magnitude, operation):
    expected = by_pillow(photos, operation).int()
    found = image_ops.apply(photos, [name] * 5, np.full(5, float(magnitude)), (0, 0, 0)).int()
    assert (found - expected).abs().max() <= 1  # a product that is rounded in another precision
    assert (found != expected).float().mean() < 0.01


def test_what_comes_from_beyond_the_image_is_the_fill(photos):
    moved = image_ops.apply(photos, ["TranslateX"] * 5, np.full(5, 10.0), FILL)
    assert (moved[..., -10:] == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all()
    assert torch.equal(moved[..., :-10], photos[..., 10:])


def test_a_batch_gives_each_image_its_own(photos):
    """Mixed operations and magnitudes of one kind in a batch: as one by one."""
    names = ["Equalize", "Posterize", "Contrast", "Brightness", "Solarize"]
    magnitudes = np.array([0.0, 4.0, 1.5, 0.4, 100.0])
    together = image_ops.apply(photos, names, magnitudes, FILL)
    for i in range(5):
        alone = image_ops.apply(photos[i : i + 1], names[i : i + 1], magnitudes[i : i + 1], FILL)
        assert torch.equal(together[i], alone[0])
    moves, magnitudes = (
        ["Rotate", "ShearX", "TranslateY", "ShearY", "TranslateX"],
        np.array([20.0, 0.2, 3.0, -0.1, 7.0]),
    )
    together = image_ops.apply(photos, moves, magnitudes, FILL)
    for i in range(5):
        alone = image_ops.apply(photos[i : i + 1], moves[i : i + 1], magnitudes[i : i + 1], FILL)
        assert torch.equal(together[i], alone[0])
