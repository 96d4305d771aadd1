"""RandAugment of a whole batch, with its own operations for each image.

Cubuk et al. 2020, arXiv 1909.13719. There are two sets of operations and strengths: torchvision's
``RandAugment(2, 9)``, and timm's, written as ``rand-m9-mstd0.5-inc1``. timm draws between bilinear
and bicubic interpolation; here it is always bilinear. The operations themselves are in `image_ops`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from scipy.special import ndtri
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.training.loop.draws import to_device
from bvit_interp.training.loop.image_ops import GROUPS, apply

NUMBERS = 4  # random numbers per operation: which, whether, its strength, its sign
_SPEC = re.compile(r"rand(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?))*")
_LEVELS = 10.0  # timm's scale of strengths
Magnitude = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]
"""Strengths ``(n,)``, signs ``(n,)`` of 1 or -1, and the images' height and width -> the argument
of Pillow, ``(n,)``."""


def _whole(values: np.ndarray) -> np.ndarray:
    return np.trunc(values + 1e-9)


_TORCHVISION: dict[str, Magnitude] = {  # the strength is 0..1
    "Identity": lambda m, s, size: 0 * m,
    "ShearX": lambda m, s, size: 0.3 * m * s,
    "ShearY": lambda m, s, size: 0.3 * m * s,
    "TranslateX": lambda m, s, size: -_whole(150 / 331 * size[1] * m) * s,
    "TranslateY": lambda m, s, size: -_whole(150 / 331 * size[0] * m) * s,
    "Rotate": lambda m, s, size: 30 * m * s,
    "Brightness": lambda m, s, size: 1 + 0.9 * m * s,
    "Color": lambda m, s, size: 1 + 0.9 * m * s,
    "Contrast": lambda m, s, size: 1 + 0.9 * m * s,
    "Sharpness": lambda m, s, size: 1 + 0.9 * m * s,
    "Posterize": lambda m, s, size: 8 - np.rint(4 * m),
    "Solarize": lambda m, s, size: 255 * (1 - m),
    "AutoContrast": lambda m, s, size: 0 * m,
    "Equalize": lambda m, s, size: 0 * m,
}
_TIMM: dict[str, Magnitude] = {  # the strength is 0..1, or more if mmax allows it
    "AutoContrast": lambda m, s, size: 0 * m,
    "Equalize": lambda m, s, size: 0 * m,
    "Invert": lambda m, s, size: 0 * m,
    "Rotate": lambda m, s, size: 30 * m * s,
    "Posterize": lambda m, s, size: np.maximum(_whole(4 * m), 1),  # at least one bit is kept
    "Solarize": lambda m, s, size: np.minimum(256, _whole(256 * m)),
    "SolarizeAdd": lambda m, s, size: np.minimum(128, _whole(110 * m)),
    "Color": lambda m, s, size: 0.1 + 1.8 * m,
    "Contrast": lambda m, s, size: 0.1 + 1.8 * m,
    "Brightness": lambda m, s, size: 0.1 + 1.8 * m,
    "Sharpness": lambda m, s, size: 0.1 + 1.8 * m,
    "ShearX": lambda m, s, size: 0.3 * m * s,
    "ShearY": lambda m, s, size: 0.3 * m * s,
    "TranslateX": lambda m, s, size: 0.45 * size[1] * m * s,
    "TranslateY": lambda m, s, size: 0.45 * size[0] * m * s,
}
_ENHANCED: Magnitude = lambda m, s, size: np.maximum(0.1, 1 + 0.9 * m * s)  # noqa: E731
_TIMM_INCREASING = _TIMM | {
    "Posterize": lambda m, s, size: np.maximum(4 - _whole(4 * m), 1),
    "Solarize": lambda m, s, size: 256 - np.minimum(256, _whole(256 * m)),
    "Color": _ENHANCED,
    "Contrast": _ENHANCED,
    "Brightness": _ENHANCED,
    "Sharpness": _ENHANCED,
}


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Operations that are drawn for each image of a batch.

    Parameters
    ----------
    space : operation -> its magnitude; all operations are equally likely.
    operations : number of operations per image, applied one after another.
    probability : probability that a drawn operation is applied, 0..1.
    strength : strength on the scale of the space, where 1 is the full range.
    deviation : standard deviation of the strength; if infinite, it is uniform in 0..`strength`.
    largest : the strength is clipped to 0..`largest`.
    fill : colour of pixels from outside the image, per channel 0..255.
    """

    space: dict[str, Magnitude]
    operations: int
    probability: float
    strength: float
    deviation: float
    largest: float
    fill: tuple[int, int, int]

    @property
    def width(self) -> int:
        """Number of random numbers per image."""
        return NUMBERS * self.operations

    def __call__(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        draws: Float[np.ndarray, "batch numbers"],
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """The augmented batch; the images that are given do not change.

        Parameters
        ----------
        draws : uniform numbers, at least `width` per image.
        """
        if self.operations:
            images = images.clone()
        names = list(self.space)
        for i in range(self.operations):
            which, whether, strength, sign = draws[:, NUMBERS * i : NUMBERS * (i + 1)].T
            drawn = (which * len(names)).astype(np.int64)
            drawn[whether >= self.probability] = -1
            self._operate(
                images, names, drawn, self._strengths(strength), np.where(sign < 0.5, -1.0, 1.0)
            )
        return images

    def _strengths(self, uniform: np.ndarray) -> np.ndarray:
        if self.deviation == 0:
            return np.full(len(uniform), min(self.strength, self.largest))
        if math.isinf(self.deviation):
            return np.minimum(uniform * self.strength, self.largest)
        normal = ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))
        return np.clip(self.strength + self.deviation * normal, 0, self.largest)

    def _operate(
        self,
        images: Tensor,
        names: list[str],
        drawn: np.ndarray,
        strengths: np.ndarray,
        signs: np.ndarray,
    ) -> None:
        """Apply operation ``names[drawn]`` to each image, in place; -1 stands for none."""
        size = (images.shape[2], images.shape[3])
        magnitudes = np.zeros(len(drawn))
        for number, name in enumerate(names):
            chosen = drawn == number
            magnitudes[chosen] = self.space[name](strengths[chosen], signs[chosen], size)
        number_of = {name: number for number, name in enumerate(names)}
        for group in GROUPS:
            members = [number_of[name] for name in group if name in number_of]
            (rows,) = np.isin(drawn, members).nonzero()
            if not len(rows):
                continue
            chosen_names = [names[number] for number in drawn[rows]]
            index = to_device(rows, images.device)
            images[index] = apply(images[index], chosen_names, magnitudes[rows], self.fill)


def like_torchvision() -> RandAugment:
    """torchvision's ``RandAugment(num_ops=2, magnitude=9)``, which fills with black."""
    return RandAugment(
        space=_TORCHVISION,
        operations=2,
        probability=1.0,
        strength=9 / 30,
        deviation=0.0,
        largest=1.0,
        fill=(0, 0, 0),
    )


def like_timm(spec: str, fill: tuple[int, int, int]) -> RandAugment:
    """timm's RandAugment, given as timm writes it: ``rand-m9-mstd0.5-inc1``.

    Parameters
    ----------
    spec : the parts m, n, p, mstd, mmax and inc.
    fill : as in `RandAugment`.

    Raises
    ------
    UserError
        For any other part; timm's sets of transforms (t...) are not supported.
    """
    if not _SPEC.fullmatch(spec):
        raise UserError(
            "recipe: randaugment must be torchvision or timm's words m, n, p, mstd, mmax and inc, "
            f"as in rand-m9-mstd0.5-inc1, got {spec!r}"
        )
    given = {key: float(value) for key, value in re.findall(r"-([a-z]+)([\d.]+)", spec)}
    deviation = given.get("mstd", 0.0)
    return RandAugment(
        space=_TIMM_INCREASING if given.get("inc") else _TIMM,
        operations=int(given.get("n", 2)),
        probability=given.get("p", 0.5),
        strength=given.get("m", _LEVELS) / _LEVELS,
        deviation=math.inf if deviation > 100 else deviation / _LEVELS,
        largest=(given.get("mmax") or _LEVELS) / _LEVELS,
        fill=fill,
    )
