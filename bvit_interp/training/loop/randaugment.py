"""RandAugment of a whole batch on any device, each image with its own operations (Cubuk et al.
2020, arXiv 1909.13719).

Two sets of operations and strengths: torchvision's ``RandAugment(2, 9)`` and timm's words, as
``rand-m9-mstd0.5-inc1``. Every operation is the arithmetic of Pillow's, on which both are built,
and of one of four kinds: a new place for each pixel (shear, translate, rotate), a table of 256
values for each channel (brightness, contrast, posterize, solarize, autocontrast, equalize, invert),
a share of the image's grey, or of its smoothed self. What images of a batch drew the same kind is
done at once. Where timm draws between bilinear and bicubic interpolation, it is bilinear here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor

from bvit_interp.errors import UserError
from bvit_interp.training.loop.draws import sent

DRAWN = 4  # random numbers that an operation takes: which, whether, its strength, its sign
_WORDS = re.compile(r"rand(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?))*")
_LEVELS = 10.0  # timm's scale of strengths
_LUMA = (19595, 38470, 7471)  # Pillow's grey: shares of 2**16
_SMOOTH = 13.0  # Pillow's SMOOTH: a 3 x 3 window of ones with 5 in its centre

_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_TABLES = (
    "Brightness",
    "Contrast",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "AutoContrast",
    "Equalize",
    "Invert",
)
Magnitude = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]
"""Strengths ``(n,)`` on the set's scale, signs ``(n,)`` of 1 or -1, height and width -> what Pillow
is given."""


def _whole(values: np.ndarray) -> np.ndarray:
    return np.trunc(values + 1e-9)


_TORCHVISION: dict[str, Magnitude] = {  # strength 0..1 of 31 steps
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
_TIMM: dict[str, Magnitude] = {  # strength 0..1 of ten levels; more where mmax allows it
    "AutoContrast": lambda m, s, size: 0 * m,
    "Equalize": lambda m, s, size: 0 * m,
    "Invert": lambda m, s, size: 0 * m,
    "Rotate": lambda m, s, size: 30 * m * s,
    "Posterize": lambda m, s, size: np.maximum(_whole(4 * m), 1),  # of no bits at all one is kept
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
    """Operations drawn for each image of a batch.

    Parameters
    ----------
    space : operation -> its magnitude; each is as likely.
    operations : how many are drawn for an image, one after another.
    probability : that a drawn operation takes place.
    strength : on the space's scale, where 1 is its full range.
    deviation : of the strength, normal; infinite for a uniform one between 0 and `strength`.
    largest : the strength is clipped to 0..`largest`.
    fill : what comes in from beyond the image, per channel 0..255.
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
        """Random numbers that an image takes."""
        return DRAWN * self.operations

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """The batch augmented.

        Parameters
        ----------
        images : ``(B, 3, H, W)`` uint8, on any device; left as it is.
        draws : uniform numbers ``(B, width)``.
        """
        if self.operations:
            images = images.clone()
        names = list(self.space)
        for i in range(self.operations):
            which, whether, strength, sign = draws[:, DRAWN * i : DRAWN * (i + 1)].T
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
        """One operation on each image, in place."""
        size = (images.shape[2], images.shape[3])
        magnitudes = np.zeros(len(drawn))
        for number, name in enumerate(names):
            own = drawn == number
            magnitudes[own] = self.space[name](strengths[own], signs[own], size)
        number_of = {name: number for number, name in enumerate(names)}
        for kind in (_MOVES, _TABLES, ("Color",), ("Sharpness",)):
            members = [number_of[name] for name in kind if name in number_of]
            (rows,) = np.isin(drawn, members).nonzero()
            if not len(rows):
                continue
            labels = [names[number] for number in drawn[rows]]
            index = sent(rows, images.device)
            images[index] = apply(images[index], labels, magnitudes[rows], self.fill)


def torchvisions() -> RandAugment:
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


def timms(words: str, fill: tuple[int, int, int]) -> RandAugment:
    """timm's RandAugment by its words: m, n, p, mstd, mmax and inc, as in ``rand-m9-mstd0.5-inc1``.

    Raises
    ------
    UserError
        For other words; timm's sets of transforms (t...) are among them.
    """
    if not _WORDS.fullmatch(words):
        raise UserError(
            "recipe: randaugment must be torchvision or timm's words m, n, p, mstd, mmax and inc, "
            f"as rand-m9-mstd0.5-inc1, got {words!r}"
        )
    given = {key: float(value) for key, value in re.findall(r"-([a-z]+)([\d.]+)", words)}
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


def apply(
    images: Tensor, names: list[str], magnitudes: np.ndarray, fill: tuple[int, int, int]
) -> Tensor:
    """One operation on each image, all of one kind, ``(n, 3, H, W)`` uint8.

    Parameters
    ----------
    images : ``(n, 3, H, W)`` uint8.
    names : an operation for each image; all move pixels, all are tables, or all are one of Color
        and Sharpness.
    magnitudes : what Pillow is given: degrees, pixels, a slope, a factor, bits or a threshold,
        ``(n,)``.
    fill : what comes in from beyond the image, per channel.
    """
    if names[0] in _MOVES:
        return _moved(images, names, magnitudes, fill)
    amount = sent(magnitudes.astype(np.float32), images.device)
    if names[0] in _TABLES:
        tables = _tables(images, names, amount)
        return (
            tables.flatten(0, 1).gather(1, images.flatten(0, 1).flatten(1).long()).view_as(images)
        )
    other = _grey(images)[:, None] if names[0] == "Color" else _smooth(images)
    return _blend(other, images, amount[:, None, None, None])


def _moved(
    images: Tensor, names: list[str], magnitudes: np.ndarray, fill: tuple[int, int, int]
) -> Tensor:
    """Shear, translate, rotate: pixel (x, y) of the result is taken from a x + b y + c, d x + e y +
    f."""
    high, wide = images.shape[2:]
    matrices = np.zeros((len(names), 2, 3), np.float32)
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1
    for name, place in (
        ("ShearX", (0, 1)),
        ("ShearY", (1, 0)),
        ("TranslateX", (0, 2)),
        ("TranslateY", (1, 2)),
    ):
        own = np.array([other == name for other in names])
        matrices[own, place[0], place[1]] = magnitudes[own]
    own = np.array([other == "Rotate" for other in names])
    angle = -np.deg2rad(magnitudes[own])
    cosine, sine = np.cos(angle), np.sin(angle)
    matrices[own, 0, 0] = matrices[own, 1, 1] = cosine
    matrices[own, 0, 1], matrices[own, 1, 0] = sine, -sine
    x, y = wide / 2, high / 2
    matrices[own, 0, 2], matrices[own, 1, 2] = x - cosine * x - sine * y, y + sine * x - cosine * y
    device = images.device
    given = sent(matrices, device)
    columns, rows = torch.arange(wide, device=device) + 0.5, torch.arange(high, device=device) + 0.5
    # places in the source in pixels, (n, 2, H, W): x, then y
    places = (
        given[:, :, 0, None, None] * columns
        + given[:, :, 1, None, None] * rows[:, None]
        + given[:, :, 2, None, None]
    )
    sides = sent(np.array([wide, high], np.float32), device).view(2, 1, 1)
    inside = ((places >= 0) & (places < sides)).all(1, keepdim=True)
    grid = (2 * places / sides - 1).permute(0, 2, 3, 1)
    moved = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    ground = sent(np.array(fill, np.float32), device).view(3, 1, 1)
    return torch.where(inside, moved + 1e-3, ground).clamp_(0, 255).to(torch.uint8)


def _tables(images: Tensor, names: list[str], amount: Tensor) -> Tensor:
    """The 256 new values of every channel, ``(n, 3, 256)`` uint8."""
    device = images.device
    values = torch.arange(256, device=device, dtype=torch.float32)
    tables = torch.empty(len(names), 3, 256, device=device, dtype=torch.uint8)
    for name in dict.fromkeys(names):
        rows = sent(np.array([i for i, other in enumerate(names) if other == name]), device)
        own, at = images[rows], amount[rows][:, None, None]
        tables[rows] = _table(name, own, at, values).expand(len(own), 3, 256)
    return tables


def _table(name: str, images: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """One operation's tables, broadcastable to ``(n, 3, 256)``, of magnitudes ``(n, 1, 1)``."""
    if name == "Brightness":
        return _blend(torch.zeros_like(values), values, at)
    if name == "Contrast":
        mean = (_grey(images).float().mean((1, 2)) + 0.5).floor()[:, None, None]
        return _blend(mean, values, at)
    if name == "Posterize":
        step = 2 ** (8 - at)
        return ((values / step).floor() * step).to(torch.uint8)
    if name == "Solarize":
        return torch.where(values < at, values, 255 - values).to(torch.uint8)
    if name == "SolarizeAdd":
        return torch.where(values < 128, (values + at).clamp(max=255), values).to(torch.uint8)
    if name == "Invert":
        return (255 - values).to(torch.uint8)
    if name == "AutoContrast":
        low, high = (
            part.float()[..., None]
            for part in (images.flatten(2).amin(2), images.flatten(2).amax(2))
        )
        scale = 255 / (high - low).clamp(min=1)
        # the small number keeps whole results whole where the two products round differently
        stretched = (values * scale - low * scale + 1e-4).floor().clamp(0, 255)
        return torch.where(high > low, stretched, values).to(torch.uint8)
    if name == "Equalize":
        return _equalized(images, values)
    raise ValueError(f"no table of {name!r}")


def _equalized(images: Tensor, values: Tensor) -> Tensor:
    """Pillow's histogram equalisation."""
    flat = images.flatten(0, 1).flatten(1).long()
    counts = torch.zeros(len(flat), 256, device=images.device).scatter_add_(
        1, flat, torch.ones_like(flat).float()
    )
    last = counts.gather(1, flat.amax(1, keepdim=True))  # how often the brightest value occurs
    step = ((counts.sum(1, keepdim=True) - last) / 255).floor()
    before = counts.cumsum(1) - counts
    equal = ((step / 2).floor() + before).div(step.clamp(min=1)).floor().clamp(max=255)
    return torch.where(step > 0, equal, values).to(torch.uint8).view(len(images), 3, 256)


def _grey(images: Tensor) -> Tensor:
    """Pillow's luma, ``(n, H, W)`` uint8."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 2**15) >> 16).to(torch.uint8)


def _smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter; the border keeps its values."""
    pixels, result = images.float(), images.clone()
    if min(images.shape[2:]) < 3:
        return result
    window = F.avg_pool2d(pixels, 3, stride=1, divisor_override=1) + 4 * pixels[:, :, 1:-1, 1:-1]
    result[:, :, 1:-1, 1:-1] = (window / _SMOOTH + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return result


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``other + factor (images - other)`` as Pillow blends: clipped, fractions cut off; uint8."""
    mixed = other.float() + factor * (images.float() - other.float())
    return (mixed + 1e-4).clamp_(0, 255).to(torch.uint8)
