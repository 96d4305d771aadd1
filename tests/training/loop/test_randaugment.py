"""Each operation against Pillow's, by way of torchvision's and timm's transforms; what is drawn
against theirs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode, v2

from bvit_interp.errors import UserError
from bvit_interp.training.loop import randaugment
from bvit_interp.training.loop.draws import drawn_for

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
MOVES = {*SIGNED}


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
    found = randaugment.apply(photos, [name] * 5, given, (0, 0, 0)).float()
    difference = (found - expected).abs()
    assert difference.max() <= 1
    assert difference.mean() < 0.01
    other = randaugment.apply(
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
    found = randaugment.apply(photos, [name] * 5, np.full(5, float(magnitude)), (0, 0, 0)).int()
    assert (found - expected).abs().max() <= 1  # a product that is rounded in another precision
    assert (found != expected).float().mean() < 0.01


def test_what_comes_from_beyond_the_image_is_the_fill(photos):
    moved = randaugment.apply(photos, ["TranslateX"] * 5, np.full(5, 10.0), FILL)
    assert (moved[..., -10:] == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all()
    assert torch.equal(moved[..., :-10], photos[..., 10:])


def test_a_batch_gives_each_image_its_own(photos):
    """Mixed operations and magnitudes of one kind in a batch: as one by one."""
    names = ["Equalize", "Posterize", "Contrast", "Brightness", "Solarize"]
    magnitudes = np.array([0.0, 4.0, 1.5, 0.4, 100.0])
    together = randaugment.apply(photos, names, magnitudes, FILL)
    for i in range(5):
        alone = randaugment.apply(photos[i : i + 1], names[i : i + 1], magnitudes[i : i + 1], FILL)
        assert torch.equal(together[i], alone[0])
    moves, magnitudes = (
        ["Rotate", "ShearX", "TranslateY", "ShearY", "TranslateX"],
        np.array([20.0, 0.2, 3.0, -0.1, 7.0]),
    )
    together = randaugment.apply(photos, moves, magnitudes, FILL)
    for i in range(5):
        alone = randaugment.apply(photos[i : i + 1], moves[i : i + 1], magnitudes[i : i + 1], FILL)
        assert torch.equal(together[i], alone[0])


class Noted(randaugment.RandAugment):
    """Notes what would be done."""

    seen: list

    def _operate(self, images, names, drawn, strengths, signs):
        size = (40, 48)
        for number, strength, sign in zip(drawn, strengths, signs, strict=True):
            name = None if number < 0 else names[number]
            given = (
                None
                if name is None
                else self.space[name](np.array([strength]), np.array([sign]), size)[0]
            )
            self.__dict__["seen"].append((name, given))


def noted(transform, n=20_000):
    watcher = Noted(**{key: getattr(transform, key) for key in transform.__dataclass_fields__})
    watcher.__dict__["seen"] = []
    watcher(
        torch.zeros(n, 3, 1, 1, dtype=torch.uint8),
        np.random.default_rng(1).random((n, transform.width)),
    )
    return watcher.__dict__["seen"]


def test_torchvisions_operations_are_drawn_alike(photos):
    seen = noted(randaugment.torchvisions())
    assert len(seen) == 2 * 20_000
    counts = Counter(name for name, _ in seen)
    assert {*counts} == {*v2.RandAugment._AUGMENTATION_SPACE}
    share = np.array([counts[name] for name in counts]) / len(seen)
    np.testing.assert_allclose(share, 1 / 14, atol=0.005)
    for name, (magnitudes, signed) in v2.RandAugment._AUGMENTATION_SPACE.items():
        given = {round(float(value), 4) for other, value in seen if other == name}
        table = magnitudes(31, 40, 48)
        if table is None:
            continue
        strength = float(table[9])
        if name.startswith("Translate"):
            strength = float(int(strength))
        wanted = {strength, -strength} if signed else {strength}
        if name in FACTORS:
            wanted = {1 + value for value in wanted}
        if name == "Solarize":
            wanted = {255 * strength}
        if name in MOVES:  # Pillow takes the place a pixel comes from, torchvision the way it goes
            given = {*given} | {-value for value in given}
        np.testing.assert_allclose(sorted(given), sorted(wanted), atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "words", ["rand-m9-mstd0.5-inc1", "rand-m5-n1-p0.8", "rand-m7-mstd101-inc1", "rand-m10-mstd2"]
)
def test_timms_operations_are_drawn_alike(words, monkeypatch):
    """Names, how often, and the distribution of what Pillow is given, against timm's own draws."""
    from timm.data import auto_augment

    theirs = []
    for name in (
        "AutoContrast",
        "Equalize",
        "Invert",
        "Rotate",
        "Posterize",
        "PosterizeIncreasing",
        "Solarize",
        "SolarizeIncreasing",
        "SolarizeAdd",
        "Color",
        "ColorIncreasing",
        "Contrast",
        "ContrastIncreasing",
        "Brightness",
        "BrightnessIncreasing",
        "Sharpness",
        "SharpnessIncreasing",
        "ShearX",
        "ShearY",
        "TranslateXRel",
        "TranslateYRel",
    ):
        monkeypatch.setitem(
            auto_augment.NAME_TO_OP,
            name,
            lambda img, *args, name=name, **_: theirs.append((name, args)) or img,
        )
    transform = auto_augment.rand_augment_transform(words, {"img_mean": FILL})
    with drawn_for(0):
        for _ in range(6000):
            transform(Image.new("RGB", (48, 40)))
    ours = [
        (name, value)
        for name, value in noted(randaugment.timms(words, FILL), 6000)
        if name is not None
    ]
    assert len(ours) == pytest.approx(len(theirs), rel=0.06)
    plain = {name: name.removesuffix("Increasing").removesuffix("Rel") for name, _ in theirs}
    assert {*plain.values()} == {name for name, _ in ours}
    for name, short in plain.items():
        theirs_given = np.array(
            [args[0] for other, args in theirs if other == name and args], float
        )
        ours_given = np.array([value for other, value in ours if other == short])
        if not len(theirs_given):
            continue
        if short.startswith("Translate"):
            theirs_given = theirs_given * (48 if short == "TranslateX" else 40)
        if short == "Posterize":
            theirs_given = theirs_given.clip(1)
        scale = max(np.abs(theirs_given).max(), 1e-9)
        for quantile in (0.1, 0.3, 0.7, 0.9):
            low, high = np.quantile(
                theirs_given, [max(quantile - 0.08, 0), min(quantile + 0.08, 1)]
            )
            assert low - 0.02 * scale <= np.quantile(ours_given, quantile) <= high + 0.02 * scale, (
                name,
                quantile,
            )


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
    ],
)
def test_other_words_are_refused(words):
    with pytest.raises(UserError, match="randaugment must be torchvision or timm's words .* got"):
        randaugment.timms(words, FILL)


def test_the_images_given_stay_as_they_are(photos):
    before = photos.clone()
    randaugment.torchvisions()(photos, np.random.default_rng(0).random((5, 8)))
    assert torch.equal(photos, before)
