"""Layouts of small modules: the grid of torch's own convolution, and prefixes by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bvit_interp.errors import UserError
from bvit_interp.models.prefix import find_layout

WIDTH = 8
IMAGES = torch.zeros(2, 3, 32, 48)
PATCHES = 4 * 6  # of 8 x 8 px


def layout(model, count, images=IMAGES, prefix=None, grid=None, fixed=()):
    """The layout for a state of `count` tokens."""
    return find_layout(model, images, torch.zeros(2, count, WIDTH), 10, prefix, grid, fixed)


@pytest.fixture
def model():
    """A patch embedding of 8 x 8 px."""
    return nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8))


@pytest.mark.parametrize(
    ("kernel", "padding", "size"),
    [(8, 0, (32, 48)), ((8, 16), 0, (32, 48)), (8, (4, 0), (32, 48)), (8, 3, (35, 50))],
)
def test_the_grid_is_what_the_convolution_gives(kernel, padding, size):
    images = torch.zeros(2, 3, *size)
    convolution = nn.Conv2d(3, WIDTH, kernel, kernel, padding)
    grid = tuple(convolution(images).shape[-2:])
    found = layout(nn.Sequential(convolution), grid[0] * grid[1] + 1, images)
    assert (found.grid, found.image_size, found.channels) == (grid, size, 3)
    assert (found.prefix, found.width, found.num_classes) == (("reg",), WIDTH, 10)


def test_a_convolution_that_cuts_no_patches_has_no_say():
    """Of 1 x 1 px, or overlapping; the grid of a square number of tokens is a square."""
    stem = [nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, 2)]
    assert layout(nn.Sequential(*stem, nn.Conv2d(3, WIDTH, 8, 8)), PATCHES).grid == (4, 6)
    assert layout(nn.Sequential(*stem), 25).grid == (5, 5)
    with pytest.raises(UserError, match="give grid"):
        layout(nn.Sequential(*stem), PATCHES)
    assert layout(nn.Sequential(*stem), PATCHES, grid=(3, 8)).grid == (3, 8)


def test_prefix_tokens_go_by_the_names_of_parameters(model):
    """In the usual order, and as many registers as rows; elsewhere their names mean nothing."""
    model.register_tokens = nn.Parameter(torch.zeros(1, 3, WIDTH))
    model.distillation_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    model.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    assert layout(model, PATCHES + 5).prefix == ("cls", "dist", "reg", "reg", "reg")
    assert layout(model, PATCHES + 2).prefix == ("reg", "reg")
    assert layout(model, PATCHES).prefix == ()
    assert layout(model, PATCHES + 2, prefix=("cls", "reg")).prefix == ("cls", "reg")
    with pytest.raises(UserError, match="give grid"):
        layout(model, PATCHES + 2, prefix="cls")


def test_tokens_that_are_the_same_for_every_image_come_first(model):
    same, own = [True], [False]
    for fixed in (2 * same + PATCHES * own, (PATCHES + 2) * own, (PATCHES + 2) * same):
        assert layout(model, PATCHES + 2, fixed=fixed).num_prefix_tokens == 2
    for fixed in (same + PATCHES * own + same, same + (PATCHES + 1) * own):
        with pytest.raises(UserError, match="have to come first"):
            layout(model, PATCHES + 2, fixed=fixed)


@pytest.mark.parametrize("shape", [(2, WIDTH), (PATCHES, 2, WIDTH), (4, PATCHES, WIDTH)])
def test_a_state_of_another_shape_is_refused(model, shape):
    with pytest.raises(UserError, match="batch, tokens, width") as refusal:
        find_layout(model, IMAGES, torch.zeros(shape), 10, None, None)
    assert ("batch_first" in str(refusal.value)) == (shape[1] == 2)
