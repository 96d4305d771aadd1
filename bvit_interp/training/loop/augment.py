"""Augment batches of training images: crop, flip, RandAugment, erasing.

The order is the paper's (arXiv 2605.10661, section 3.3): crop, flip, RandAugment, normalise, Random
Erasing. It works on batches and on any device. Each image has its own row of uniform numbers
(`draws.Draws`), which depends on the seed, the epoch and the image. `mixing.Mixing` follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.training.loop import crops, mixing, randaugment
from bvit_interp.training.loop.recipe import Recipe

_ERASED_AREA = (0.02, 0.33)  # share of the image's area, as in torchvision
_ERASED_RATIO = (0.3, 3.3)
ERASING_WIDTH = 1 + 2 * crops.TRIES + 2  # numbers: whether to erase, areas, ratios, a position
_BOXES: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "none": crops.whole_boxes,
    "padded": crops.padded_boxes,
    "random-resized": crops.random_boxes,
}


class Augmentation:
    """A recipe's training images at a model's size.

    Parameters
    ----------
    recipe : its crop, flip, randaugment and erase are used.
    model : its input size, mean and standard deviation are used.

    Attributes
    ----------
    width : uniform numbers per image, those of `Mixing` included.
    size : height and width of the result, pixels.
    """

    def __init__(self, recipe: Recipe, model: VisionTransformer) -> None:
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        height, width = model.patch_embed.img_size
        self.size: tuple[int, int] = (height, width)
        self.crop, self.erase = recipe.crop, recipe.erase
        self.flip_probability = 0.5 if recipe.flip else 0.0
        self.mean, self.std = (
            torch.tensor(cfg[key]).view(3, 1, 1) * 255 for key in ("mean", "std")
        )
        self.randaugment: randaugment.RandAugment | None = None
        if recipe.randaugment == "torchvision":
            self.randaugment = randaugment.like_torchvision()
        elif recipe.randaugment is not None:
            red, green, blue = (round(255 * mean) for mean in cfg["mean"])
            self.randaugment = randaugment.like_timm(recipe.randaugment, (red, green, blue))
        self._erasing = crops.WIDTH + (0 if self.randaugment is None else self.randaugment.width)
        self._mixing = self._erasing + ERASING_WIDTH
        self.width = self._mixing + mixing.WIDTH

    def __call__(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        draws: Float[np.ndarray, "batch numbers"],
    ) -> Float[Tensor, "batch 3 model_height model_width"]:
        """Augmented and normalised images, on the same device.

        Parameters
        ----------
        draws : uniform numbers, at least `width` per image.
        """
        return self.coloured(self.cropped(images, draws), draws)

    def cropped(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        draws: Float[np.ndarray, "batch numbers"],
    ) -> UInt8[Tensor, "batch 3 model_height model_width"]:
        """The first part: crop and flip.

        Raises
        ------
        UserError
            If the crop does not resize and the images have another size than the model's.
        """
        size = (images.shape[2], images.shape[3])
        if self.crop != "random-resized" and size != self.size:
            raise UserError(wrong_size(size, self.size))
        boxes = _BOXES[self.crop](draws, size)
        return crops.cut(images, boxes, crops.flips(draws, self.flip_probability), self.size)

    def coloured(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        draws: Float[np.ndarray, "batch numbers"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """The second part: RandAugment, normalisation and erasing."""
        if self.randaugment is not None:
            images = self.randaugment(images, draws[:, crops.WIDTH :])
        mean, std = (part.to(images.device, non_blocking=True) for part in (self.mean, self.std))
        pixels = (images - mean) / std
        if self.erase:
            boxes = erased_boxes(draws[:, self._erasing :], self.erase, self.size)
            pixels.masked_fill_(crops.inside_boxes(boxes, self.size, pixels.device), 0.0)
        return pixels

    def mixing_draws(
        self, draws: Float[np.ndarray, "batch numbers"]
    ) -> Float[np.ndarray, "batch mixing_numbers"]:
        """The columns of the uniform numbers that `Mixing` uses."""
        return draws[:, self._mixing :]


def wrong_size(found: tuple[int, ...], wanted: tuple[int, int]) -> str:
    """The error message for an image of another height and width than the model's."""
    found_text, wanted_text = (" x ".join(map(str, size)) for size in (found, wanted))
    return f"an image of {found_text} pixels for a model of {wanted_text}: use crop=random-resized"


def erased_boxes(
    draws: Float[np.ndarray, "batch numbers"], probability: float, size: tuple[int, int]
) -> Int[np.ndarray, "batch 4"]:
    """Boxes of torchvision's `RandomErasing`: top, left, height and width.

    Boxes of images that keep all their pixels are empty.

    Parameters
    ----------
    draws : uniform numbers, at least `ERASING_WIDTH` per image.
    probability : probability that a box of an image is erased, 0..1.
    size : height and width of the images, pixels.
    """
    image_height, image_width = size
    low, high = _ERASED_AREA
    area = image_height * image_width * (low + (high - low) * draws[:, 1 : 1 + crops.TRIES])
    low, high = np.log(_ERASED_RATIO)
    ratio = np.exp(low + (high - low) * draws[:, 1 + crops.TRIES : 1 + 2 * crops.TRIES])
    heights = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    widths = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (heights < image_height) & (widths < image_width)
    first_fit = fits.argmax(1)[:, None]
    erases = (draws[:, 0] < probability) & fits.any(1)
    height = np.take_along_axis(heights, first_fit, 1)[:, 0] * erases
    width = np.take_along_axis(widths, first_fit, 1)[:, 0] * erases
    position = draws[:, 1 + 2 * crops.TRIES : 3 + 2 * crops.TRIES]
    top = (position[:, 0] * (image_height - height + 1)).astype(np.int64)
    left = (position[:, 1] * (image_width - width + 1)).astype(np.int64)
    return np.stack([top, left, height, width], 1)
