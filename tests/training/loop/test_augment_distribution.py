"""Augmented batches against pictures that Pillow augments one by one.

Of a few hundred draws of two photographs on either path, how far apart are their statistics? The
tolerances are stated once, and each of them is shown to tell a recipe with one other magnitude.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from bvit_interp.training.loop import augment, crops, randaugment
from bvit_interp.training.loop.draws import Draws, seeded
from bvit_interp.training.loop.recipe import Recipe

DRAWS, SIZE = 1200, (32, 32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# of the statistics in `distances`: as far as two runs of the Pillow path are apart, or a little
# more
TOLERANCES = {
    # root mean square over pixels of the difference of means, in standard deviations of all pixels
    "mean": 0.06,
    "spread": 0.05,  # the same of the pixels' own standard deviations
    "erased": 0.007,  # share of pixels that are exactly zero
    "black": 0.015,  # share that is black in all channels
    "histogram": 0.045,  # total variation of grey values in 32 bins
    # largest difference of the distribution functions of an image's mean and contrast
    "images": 0.06,
}
RECIPES = {
    "padded, torchvision": {
        "crop": "padded",
        "flip": True,
        "randaugment": "torchvision",
        "erase": 0.25,
    },
    "resized, timm": {
        "crop": "random-resized",
        "flip": True,
        "randaugment": "rand-m9-mstd0.5-inc1",
        "erase": 0.25,
    },
}


@pytest.fixture(scope="module")
def photos():
    """A light and a dark photograph without black pixels, ``(H, W, 3)`` uint8; square for the crop
    that pads."""
    from sklearn.datasets import load_sample_images

    first, second = load_sample_images().images
    return [
        np.maximum(first[100:180:2, 200:296:2], 8),
        np.maximum(second[150:230:2, 100:196:2] // 2, 8),
    ]


def plan_of(settings):
    return Recipe(model={"name": "any"}, data="any", epochs=1, **settings)


def by_pillow(plan, photos, seed):
    """The composition of the package before it had batches."""
    grey = tuple(round(255 * mean) for mean in MEAN)
    crop = {
        "padded": lambda: v2.RandomCrop(SIZE, padding=SIZE[0] // 8),
        "random-resized": lambda: v2.RandomResizedCrop(
            SIZE, interpolation=v2.InterpolationMode.BILINEAR
        ),
    }[plan.crop]()
    operations = (
        v2.RandAugment(num_ops=2, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR)
        if plan.randaugment == "torchvision"
        else rand_augment_transform(
            plan.randaugment,
            {"translate_const": 14, "img_mean": grey, "interpolation": Image.Resampling.BILINEAR},
        )
    )
    for operation in getattr(operations, "ops", ()):
        if operation.name.startswith("Posterize"):  # Pillow refuses to keep no bits at all
            operation.aug_fn = lambda image, bits, **_: ImageOps.posterize(image, max(bits, 1))
    steps = [crop, v2.RandomHorizontalFlip(), operations]
    finish = v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(plan.erase),
        ]
    )
    found = []
    for photo in photos:
        with seeded(seed, len(found)):
            for _ in range(DRAWS):
                picture = Image.fromarray(photo)
                for step in steps:
                    picture = step(picture)
                found.append(finish(picture))
    return torch.stack(found).unflatten(0, (len(photos), DRAWS))


def by_batches(plan, photos, seed):
    about = SimpleNamespace(
        pretrained_cfg={"mean": MEAN, "std": STD}, patch_embed=SimpleNamespace(img_size=SIZE)
    )
    view = augment.Augmentation(plan, about)
    batches = [
        torch.from_numpy(photo).permute(2, 0, 1).expand(DRAWS, -1, -1, -1) for photo in photos
    ]
    return torch.stack(
        [view(b, Draws([seed, i], view.width).table(DRAWS)) for i, b in enumerate(batches)]
    )


def distances(one, other):
    """How far apart the statistics of two sets of views ``(photos, draws, 3, H, W)`` are."""
    spread = torch.cat([one, other]).std()
    erased = [(part == 0).all(2) for part in (one, other)]
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (MEAN, STD))
    grey = [((part * std + mean) * 255).round() for part in (one, other)]
    black = [(part == 0).all(2).float().mean((1, 2, 3)) for part in grey]
    bins = [
        torch.stack([torch.histc(photo, 32, 0, 255) / photo.numel() for photo in part])
        for part in grey
    ]
    of_images = [
        torch.stack([part.mean((2, 3, 4)), part.std((2, 3, 4))]).sort(-1).values
        for part in (one, other)
    ]
    steps = [
        max(
            np.abs(np.searchsorted(b, b, "right") - np.searchsorted(a, b, "right")).max() / DRAWS
            for a, b in zip(x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy(), strict=True)
        )
        for x, y in (of_images, of_images[::-1])
    ]

    def rms(statistic):
        first, second = (statistic(part) for part in (one, other))
        return ((first - second).square().mean().sqrt() / spread).item()

    return {
        "mean": rms(lambda part: part.mean(1)),
        "spread": rms(lambda part: part.std(1)),
        "erased": (erased[0].float().mean() - erased[1].float().mean()).abs().item(),
        "black": (black[0] - black[1]).abs().max().item(),
        "histogram": (bins[0] - bins[1]).abs().sum(1).max().item() / 2,
        "images": max(steps),
    }


@pytest.fixture(scope="module")
def references(photos):
    """``references[name]``: recipe, photographs at the size that its crop takes, and their views by
    Pillow."""
    made = {}
    for name, settings in RECIPES.items():
        plan = plan_of(settings)
        pictures = (
            photos if plan.crop == "random-resized" else [photo[:32, :32] for photo in photos]
        )
        made[name] = plan, pictures, by_pillow(plan, pictures, 1)
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_batches_are_distributed_as_pictures_one_by_one(references, name):
    plan, pictures, theirs = references[name]
    found = distances(by_batches(plan, pictures, 1), theirs)
    assert {key: value for key, value in found.items() if value > TOLERANCES[key]} == {}


def strength_of(kind, **changes):
    made = getattr(randaugment, kind)
    return lambda monkeypatch: monkeypatch.setattr(
        randaugment, kind, lambda *given: replace(made(*given), **changes)
    )


PADDED, RESIZED = RECIPES
OTHERS = {  # what is changed, and the statistics that must tell it
    "strength 4.5 of 30": (
        PADDED,
        strength_of("like_torchvision", strength=0.15),
        {"black", "histogram", "images"},
    ),
    "strength 15 of 30": (
        PADDED,
        strength_of("like_torchvision", strength=0.5),
        {"mean", "black", "histogram", "images"},
    ),
    "filled with grey": (
        PADDED,
        strength_of("like_torchvision", fill=(124, 116, 104)),
        {"mean", "spread", "black"},
    ),
    "erased up to 0.2": (
        PADDED,
        lambda patch: patch.setattr(augment, "_ERASED_AREA", (0.02, 0.2)),
        {"erased"},
    ),
    "erased for 40 %": (PADDED, {"erase": 0.4}, {"erased", "images"}),
    "not mirrored": (PADDED, {"flip": False}, {"mean", "spread"}),
    "strength 7 of 10": (
        RESIZED,
        strength_of("like_timm", strength=0.7),
        {"mean", "spread", "black", "histogram"},
    ),
    "for 60 %": (
        RESIZED,
        strength_of("like_timm", probability=0.6),
        {"mean", "histogram", "images"},
    ),
    "filled with black": (
        RESIZED,
        strength_of("like_timm", fill=(0, 0, 0)),
        {"mean", "black", "histogram"},
    ),
    "not increasing": (
        RESIZED,
        {"randaugment": "rand-m9-mstd0.5"},
        {"spread", "black", "histogram"},
    ),
    "areas from 0.5": (RESIZED, lambda patch: patch.setattr(crops, "AREA", (0.5, 1.0)), {"images"}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_tolerances_tell_another_magnitude(references, monkeypatch, other):
    name, change, told = OTHERS[other]
    plan, pictures, theirs = references[name]
    if isinstance(change, dict):
        plan = replace(plan, **change)
    else:
        change(monkeypatch)
    found = distances(by_batches(plan, pictures, 1), theirs)
    assert told <= {key for key, value in found.items() if value > TOLERANCES[key]}


def test_every_tolerance_is_shown_to_tell_something():
    assert {key for *_, told in OTHERS.values() for key in told} == {*TOLERANCES}
