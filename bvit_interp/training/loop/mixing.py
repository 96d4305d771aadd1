"""Mixup and CutMix: each image of a batch mixed with another one.

Zhang et al. 2018 (arXiv 1710.09412) and Yun et al. 2019 (arXiv 1905.04899), with the arithmetic of
timm's ``Mixup(mode="elem")``. If the recipe has both, each of the two is used for half of the
images. A CutMix box is clipped at the border; its weight in the target is its share of the pixels.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from scipy.special import betaincinv
from torch import Tensor

from bvit_interp.training.loop.crops import inside_boxes
from bvit_interp.training.loop.draws import to_device
from bvit_interp.training.loop.recipe import Recipe

WIDTH = 4  # random numbers per image: Mixup or CutMix, the share, the centre of the box (2)
_QUANTILES = np.linspace(0, 1, 4097)


class Mixing:
    """Mixup or CutMix of a batch with itself in reverse order.

    Parameters
    ----------
    recipe : the alphas of Mixup and CutMix, and the label smoothing.
    classes : number of the model's classes.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self.mixup, self.cutmix, self.classes = recipe.mixup, recipe.cutmix, classes
        self.smoothing = recipe.label_smoothing
        self._mixup_shares, self._cutmix_shares = (  # quantiles of Beta(alpha, alpha)
            betaincinv(alpha, alpha, _QUANTILES) if alpha else None
            for alpha in (self.mixup, self.cutmix)
        )

    @property
    def active(self) -> bool:
        """Whether the recipe mixes images."""
        return bool(self.mixup or self.cutmix)

    def __call__(
        self,
        images: Float[Tensor, "images channels height width"],
        labels: Shaped[Tensor, " images"],
        draws: Float[np.ndarray, "images numbers"],
        batch: int | None = None,
    ) -> tuple[Float[Tensor, "images channels height width"], Shaped[Tensor, "images ..."]]:
        """Mixed images and their targets.

        Parameters
        ----------
        images, labels : one batch, or several batches of `batch` images one after another.
        draws : uniform numbers, at least `WIDTH` per image.
        batch : number of images that are mixed with each other; by default all.

        Returns
        -------
        The images, and soft, smoothed targets ``(images, classes)``; without mixing the labels.
        """
        if not self.active:
            return images, labels
        device, (height, width) = images.device, images.shape[2:]
        cuts = draws[:, 0] < (0.5 if self.mixup and self.cutmix else float(bool(self.cutmix)))
        share = self._shares(draws[:, 1], cuts)
        boxes, box_share = _boxes(draws[:, 2:4], share, (height, width))
        share = np.where(cuts, 1 - box_share, share)
        # CutMix keeps an image except for its box; Mixup keeps a share of every pixel
        boxes = boxes * cuts[:, None]
        pixel_share = to_device(np.where(cuts, 1.0, share).astype(np.float32), device)
        inside = inside_boxes(boxes, (height, width), device)
        weight = pixel_share[:, None, None, None] * ~inside
        mixed = _reversed(images, batch).lerp(images, weight)
        label_share = to_device(share.astype(np.float32), device)[:, None]
        targets = (
            F.one_hot(labels, self.classes) * (1 - self.smoothing) + self.smoothing / self.classes
        )
        return mixed, _reversed(targets, batch).lerp(targets, label_share)

    def _shares(self, uniform: np.ndarray, cuts: np.ndarray) -> np.ndarray:
        """Each image's own share in its mixture, drawn from Beta(alpha, alpha), ``(images,)``."""
        share = np.zeros(len(uniform))
        for chosen, quantiles in ((~cuts, self._mixup_shares), (cuts, self._cutmix_shares)):
            if quantiles is not None:
                share[chosen] = np.interp(uniform[chosen], _QUANTILES, quantiles)
        return share


def _boxes(
    centres: np.ndarray, share: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """CutMix boxes of area 1 - share, clipped at the border, and their share of the pixels.

    Returns
    -------
    Top, left, height and width ``(images, 4)`` int64, and ``(images,)``.
    """
    height, width = size
    side = np.sqrt(1 - share)
    sides = np.stack([(height * side).astype(np.int64), (width * side).astype(np.int64)], 1)
    centre = (centres * size).astype(np.int64)
    begin = np.clip(centre - sides // 2, 0, size)
    end = np.clip(centre + (sides + 1) // 2, 0, size)  # rounds up for a box with an odd side
    return np.concatenate([begin, end - begin], 1), (end - begin).prod(1) / (height * width)


def _reversed(rows: Tensor, batch: int | None) -> Tensor:
    """Each batch of `batch` rows in reverse order."""
    return rows.unflatten(0, (-1, batch or len(rows))).flip(1).flatten(0, 1)
