"""Scenes for planted models, against what they promise."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from bvit_interp.data.samples import Samples
from bvit_interp.data.scenes import CLASSES, Scenes
from bvit_interp.models.planted.patterns import DISTRACTOR, detector

SCENES = Scenes(120)


def patches(image):
    """Grey levels ``(8, 8, 16)`` of each patch."""
    return image[..., 0].reshape(8, 4, 8, 4).transpose(0, 2, 1, 3).reshape(8, 8, 16).astype(int)


def test_scenes_are_samples_that_do_not_change():
    assert isinstance(SCENES, Samples)
    image, label, mask = SCENES.read(7)
    again = Scenes(10).read(7)
    assert (image == again[0]).all()
    assert label == again[1]
    assert (mask == again[2]).all()
    assert not np.array_equal(image, Scenes(10, seed=1).read(7)[0])
    assert image.dtype == np.uint8
    assert {SCENES.read(i)[1] for i in range(len(SCENES))} == set(range(len(CLASSES)))


def test_no_patch_is_brighter_or_has_more_contrast():
    for i in range(20):
        levels = patches(SCENES.read(i)[0])
        assert (levels.mean(-1) == 128).all()
        assert (levels.std(-1) == 64).all()


def test_the_mask_is_where_the_pattern_of_the_class_is():
    filters = torch.stack([detector(k) for k in range(1, DISTRACTOR + 1)])
    for i in range(40):
        image, label, mask = SCENES.read(i)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        shown = F.conv2d(pixels, filters, stride=4)[0]
        own = torch.from_numpy(mask[::4, ::4] == label + 1).float()
        assert own.sum() == 9
        assert torch.allclose(shown[label], own, atol=0.01)
        assert torch.allclose(shown[-1].sum(), torch.tensor(9.0), atol=0.01)
        assert (shown[-1] * own).abs().max() < 0.01  # the distractor is elsewhere
        others = [k for k in range(len(CLASSES)) if k != label]
        assert shown[others].abs().max() < 0.01


def test_the_object_is_everywhere_as_often_as_the_distractor():
    filters = detector(DISTRACTOR)[None]
    places = np.zeros((2, 8, 8))
    for i in range(len(SCENES)):
        image, _, mask = SCENES.read(i)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        places += np.stack([mask[::4, ::4] > 0, F.conv2d(pixels, filters, stride=4)[0, 0] > 0.5])
    share = places / len(SCENES)
    assert np.abs(share[0] - share[1]).max() < 4 * np.sqrt(2 * 0.25 / len(SCENES))
