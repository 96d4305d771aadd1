"""What RandAugment draws, against torchvision's and timm's draws."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bvit_interp.errors import UserError
from bvit_interp.training.loop import randaugment
from bvit_interp.training.loop.draws import seeded

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


FACTORS = {"Brightness": 0.27, "Color": 0.27, "Contrast": 0.27, "Sharpness": 0.27}
MOVES = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}


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


def test_torchvisions_operations_are_drawn_alike():
    seen = noted(randaugment.like_torchvision())
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
    with seeded(0):
        for _ in range(6000):
            transform(Image.new("RGB", (48, 40)))
    ours = [
        (name, value)
        for name, value in noted(randaugment.like_timm(words, FILL), 6000)
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
        randaugment.like_timm(words, FILL)


def test_the_images_given_stay_as_they_are(photos):
    before = photos.clone()
    randaugment.like_torchvision()(photos, np.random.default_rng(0).random((5, 8)))
    assert torch.equal(photos, before)
