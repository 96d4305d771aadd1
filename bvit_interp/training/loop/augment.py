"""How training images vary: crop, flip, RandAugment, erasing, and Mixup or CutMix, on batches and
on any device.

The order is the paper's (arXiv 2605.10661, section 3.3): crop, flip, RandAugment, normalise, Random
Erasing. Every image has its own draw: a row of uniform numbers (`draws.Draws`), a function of the
seed, the epoch and the image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.training.loop import crops, randaugment
from bvit_interp.training.loop.draws import sent
from bvit_interp.training.loop.recipe import Recipe

_ERASED = (
    0.02,
    0.33,
)  # share of the area that Random Erasing takes, and ratios of its sides, as torchvision's
_ERASED_RATIO = (0.3, 3.3)
_ERASING = 1 + 2 * crops.TRIES + 2  # numbers it takes: whether, areas, ratios, a place
_MIXING = 4  # which, the share, the centre of the box
_BOXES: dict[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "none": crops.whole_boxes,
    "padded": crops.padded_boxes,
    "random-resized": crops.random_boxes,
}


class Augmentation:
    """A recipe's training images at a model's size.

    Parameters
    ----------
    recipe : its crop, flip, randaugment and erase.
    model : its input size, mean and std.

    Attributes
    ----------
    width : uniform numbers that an image takes, those of `Mixing` included.
    size : height and width of the result.
    """

    def __init__(self, recipe: Recipe, model: VisionTransformer) -> None:
        cfg = model.pretrained_cfg
        high, wide = model.patch_embed.img_size
        self.size: tuple[int, int] = (high, wide)
        self.crop, self.flip, self.erase = recipe.crop, recipe.flip, recipe.erase
        self.mean, self.std = (
            torch.tensor(cfg[key]).view(3, 1, 1) * 255 for key in ("mean", "std")
        )
        self.randaugment: randaugment.RandAugment | None = None
        if recipe.randaugment == "torchvision":
            self.randaugment = randaugment.torchvisions()
        elif recipe.randaugment is not None:
            red, green, blue = (round(255 * mean) for mean in cfg["mean"])
            self.randaugment = randaugment.timms(recipe.randaugment, (red, green, blue))
        self._erasing = crops.WIDTH + (0 if self.randaugment is None else self.randaugment.width)
        self._mixing = self._erasing + _ERASING
        self.width = self._mixing + _MIXING

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Augmented and normalised images ``(B, 3, *size)`` float32 of ``(B, 3, H, W)`` uint8, on
        the same device.

        Parameters
        ----------
        draws : uniform numbers, a row of at least `width` for each image.
        """
        return self.coloured(self.cropped(images, draws), draws)

    def cropped(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Crop and flip: ``(B, 3, H, W)`` uint8 to ``(B, 3, *size)`` uint8.

        Raises
        ------
        UserError
            Images of another size under a crop that does not resize.
        """
        size = (images.shape[2], images.shape[3])
        if self.crop != "random-resized" and size != self.size:
            raise UserError(other_size(size, self.size))
        flips = draws[:, crops.WIDTH - 1] < (0.5 if self.flip else 0)
        return crops.cut(images, _BOXES[self.crop](draws, size), flips, self.size)

    def coloured(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """What follows the crop: RandAugment, normalisation and erasing, ``(B, 3, *size)`` uint8 to
        float32."""
        if self.randaugment is not None:
            images = self.randaugment(images, draws[:, crops.WIDTH :])
        mean, std = (part.to(images.device, non_blocking=True) for part in (self.mean, self.std))
        pixels = (images - mean) / std
        if self.erase:
            boxes = erased_boxes(draws[:, self._erasing :], self.erase, self.size)
            pixels.masked_fill_(_inside(boxes, self.size, pixels.device), 0.0)
        return pixels

    def of_mixing(self, draws: np.ndarray) -> np.ndarray:
        """The columns that `Mixing` takes."""
        return draws[:, self._mixing :]


def other_size(found: tuple[int, ...], wanted: tuple[int, int]) -> str:
    """What is wrong with an image of another height and width."""
    sides = [" x ".join(map(str, size)) for size in (found, wanted)]
    return f"an image of {sides[0]} pixels for a model of {sides[1]}: use crop=random-resized"


def erased_boxes(draws: np.ndarray, probability: float, size: tuple[int, int]) -> np.ndarray:
    """Boxes of torchvision's `RandomErasing`, top, left, height and width ``(B, 4)``; empty where
    nothing is erased."""
    high, wide = size
    low, up = _ERASED
    area = high * wide * (low + (up - low) * draws[:, 1 : 1 + crops.TRIES])
    low, up = np.log(_ERASED_RATIO)
    ratio = np.exp(low + (up - low) * draws[:, 1 + crops.TRIES : 1 + 2 * crops.TRIES])
    heights, widths = (
        np.rint(np.sqrt(part)).astype(np.int64) for part in (area * ratio, area / ratio)
    )
    fits = (heights < high) & (widths < wide)
    chosen = fits.argmax(1)[:, None]
    taken = (draws[:, 0] < probability) & fits.any(1)
    height, width = (
        np.take_along_axis(sides, chosen, 1)[:, 0] * taken for sides in (heights, widths)
    )
    place = draws[:, 1 + 2 * crops.TRIES : 3 + 2 * crops.TRIES]
    top, left = (
        (place[:, i] * (side - own + 1)).astype(np.int64)
        for i, (side, own) in enumerate(((high, height), (wide, width)))
    )
    return np.stack([top, left, height, width], 1)


def _inside(boxes: np.ndarray, size: tuple[int, int], device: torch.device) -> Tensor:
    """Which pixels lie in their image's box, ``(B, 1, H, W)`` bool."""
    given = sent(boxes, device)[:, None, None, :]
    rows, columns = (
        torch.arange(size[0], device=device)[:, None],
        torch.arange(size[1], device=device),
    )
    top, left, height, width = given.unbind(-1)
    vertical = (rows >= top[..., None]) & (rows < (top + height)[..., None])
    return vertical & (columns >= left[..., None]) & (columns < (left + width)[..., None])


class Mixing:
    """Mixup or CutMix of a batch with itself in reverse order; one of the two and its share drawn
    for each image.

    Zhang et al. 2018 (arXiv 1710.09412), Yun et al. 2019 (arXiv 1905.04899), with the arithmetic of
    timm's ``Mixup(mode="elem")``: with both alphas each of the two is as likely, a box is clipped
    at the border, and the share is that of the pixels.

    Parameters
    ----------
    recipe : alphas of Mixup and CutMix, label smoothing.
    classes : of the model.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self.mixup, self.cutmix, self.classes = recipe.mixup, recipe.cutmix, classes
        self.smoothing = recipe.label_smoothing
        grid = np.linspace(0, 1, 4097)
        self._grid = grid
        self._shares = [  # quantiles of Beta(alpha, alpha)
            betaincinv(alpha, alpha, grid) if alpha else None for alpha in (self.mixup, self.cutmix)
        ]

    @property
    def active(self) -> bool:
        """Whether the recipe mixes at all."""
        return bool(self.mixup or self.cutmix)

    def __call__(
        self, images: Tensor, labels: Tensor, draws: np.ndarray, batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images ``(B, 3, H, W)`` and targets: ``(B, classes)`` soft and smoothed if anything is
        mixed, else labels.

        Parameters
        ----------
        images, labels : one batch, or several of `batch` images one after another.
        draws : uniform numbers ``(B, 4)``: which of the two, the share, the centre of the box.
        batch : images that are mixed with each other; by default all.
        """
        if not self.active:
            return images, labels
        device, (high, wide) = images.device, images.shape[2:]
        cuts = draws[:, 0] < (0.5 if self.mixup and self.cutmix else float(bool(self.cutmix)))
        share = np.zeros(len(draws))
        for which, quantiles in ((~cuts, self._shares[0]), (cuts, self._shares[1])):
            if quantiles is not None:
                share[which] = np.interp(draws[which, 1], self._grid, quantiles)
        side = np.sqrt(1 - share)
        sides = np.stack([(high * side).astype(np.int64), (wide * side).astype(np.int64)], 1)
        centre = (draws[:, 2:4] * (high, wide)).astype(np.int64)
        begin = np.clip(centre - sides // 2, 0, (high, wide))
        end = np.clip(centre + (sides + 1) // 2, 0, (high, wide))  # a box of an odd side has it too
        share = np.where(cuts, 1 - (end - begin).prod(1) / (high * wide), share)
        boxes = np.concatenate([begin, end - begin], 1) * cuts[:, None]
        own = sent(np.where(cuts, 1.0, share).astype(np.float32), device)
        weight = own[:, None, None, None] * ~_inside(boxes, (high, wide), device)
        mixed = _reversed(images, batch).lerp(images, weight)
        kept = sent(share.astype(np.float32), device)[:, None]
        targets = (
            F.one_hot(labels, self.classes) * (1 - self.smoothing) + self.smoothing / self.classes
        )
        return mixed, _reversed(targets, batch).lerp(targets, kept)


def _reversed(rows: Tensor, batch: int | None) -> Tensor:
    """Each batch of `batch` rows in reverse order."""
    return rows.unflatten(0, (-1, batch or len(rows))).flip(1).flatten(0, 1)
