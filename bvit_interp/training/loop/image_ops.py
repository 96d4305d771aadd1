"""The operations of RandAugment on a batch, with Pillow's arithmetic.

torchvision and timm build on Pillow. There are four groups of operations. Moves take each pixel
from a new position (shear, translate, rotate). Tables give 256 new values per channel (brightness,
contrast, posterize, solarize, autocontrast, equalize, invert). Color blends with the image's grey,
and Sharpness with a smoothed image. All images of one group are computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Shaped, UInt8
from torch import Tensor

from bvit_interp.training.loop.draws import to_device

MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
TABLES = (
    "Brightness",
    "Contrast",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "AutoContrast",
    "Equalize",
    "Invert",
)
GROUPS = (MOVES, TABLES, ("Color",), ("Sharpness",))
"""Groups of operations that `apply` computes together."""
_LUMA = (19595, 38470, 7471)  # Pillow's grey: shares of 2**16
_SMOOTH = 13.0  # Pillow's SMOOTH: a 3 x 3 window of ones with 5 in its centre
_MATRIX_ENTRY = {"ShearX": (0, 1), "ShearY": (1, 0), "TranslateX": (0, 2), "TranslateY": (1, 2)}


def apply(
    images: UInt8[Tensor, "batch 3 height width"],
    names: Sequence[str],
    magnitudes: Shaped[np.ndarray, " batch"],
    fill: tuple[int, int, int],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Apply one operation to each image, all of one group.

    Parameters
    ----------
    names : an operation for each image; all of one of the `GROUPS`.
    magnitudes : arguments of Pillow: degrees, pixels, a slope, a factor, bits or a threshold.
    fill : colour of pixels from outside the image, per channel 0..255.
    """
    if names[0] in MOVES:
        return _moved(images, names, magnitudes, fill)
    amounts = to_device(magnitudes.astype(np.float32), images.device)
    if names[0] in TABLES:
        tables = _tables(images, names, amounts)
        return (
            tables.flatten(0, 1).gather(1, images.flatten(0, 1).flatten(1).long()).view_as(images)
        )
    other = _grey(images)[:, None] if names[0] == "Color" else _smoothed(images)
    return _blend(other, images, amounts[:, None, None, None])


def _moved(
    images: Tensor, names: Sequence[str], magnitudes: np.ndarray, fill: tuple[int, int, int]
) -> Tensor:
    """Shear, translate or rotate each image by its matrix, with bilinear interpolation."""
    size, device = (images.shape[2], images.shape[3]), images.device
    height, width = size
    matrices = to_device(_matrices(names, magnitudes, size), device)
    columns = torch.arange(width, device=device) + 0.5
    rows = torch.arange(height, device=device) + 0.5
    # source positions in pixels, (batch, 2, height, width): x, then y
    sources = (
        matrices[:, :, 0, None, None] * columns
        + matrices[:, :, 1, None, None] * rows[:, None]
        + matrices[:, :, 2, None, None]
    )
    sides = to_device(np.array([width, height], np.float32), device).view(2, 1, 1)
    inside = ((sources >= 0) & (sources < sides)).all(1, keepdim=True)
    grid = (2 * sources / sides - 1).permute(0, 2, 3, 1)
    moved = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    background = to_device(np.array(fill, np.float32), device).view(3, 1, 1)
    return torch.where(inside, moved + 1e-3, background).clamp_(0, 255).to(torch.uint8)


def _matrices(names: Sequence[str], magnitudes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Matrices ``(batch, 2, 3)`` float32 with rows (a, b, c) and (d, e, f).

    Pixel (x, y) of the result is taken from (a x + b y + c, d x + e y + f) of the image.
    """
    height, width = size
    matrices = np.zeros((len(names), 2, 3), np.float32)
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1
    for name, (row, column) in _MATRIX_ENTRY.items():
        chosen = np.array([other == name for other in names])
        matrices[chosen, row, column] = magnitudes[chosen]
    rotated = np.array([name == "Rotate" for name in names])
    angle = -np.deg2rad(magnitudes[rotated])
    cosine, sine = np.cos(angle), np.sin(angle)
    matrices[rotated, 0, 0] = matrices[rotated, 1, 1] = cosine
    matrices[rotated, 0, 1], matrices[rotated, 1, 0] = sine, -sine
    x, y = width / 2, height / 2  # the centre of the rotation
    matrices[rotated, 0, 2] = x - cosine * x - sine * y
    matrices[rotated, 1, 2] = y + sine * x - cosine * y
    return matrices


def _tables(images: Tensor, names: Sequence[str], amounts: Tensor) -> Tensor:
    """The 256 new values of every channel, ``(batch, 3, 256)`` uint8."""
    device = images.device
    values = torch.arange(256, device=device, dtype=torch.float32)
    tables = torch.empty(len(names), 3, 256, device=device, dtype=torch.uint8)
    for name in dict.fromkeys(names):
        rows = to_device(np.array([i for i, other in enumerate(names) if other == name]), device)
        chosen, amount = images[rows], amounts[rows][:, None, None]
        tables[rows] = _table(name, chosen, amount, values).expand(len(chosen), 3, 256)
    return tables


def _table(name: str, images: Tensor, amount: Tensor, values: Tensor) -> Tensor:
    """One operation's tables, broadcastable to ``(n, 3, 256)``, for amounts ``(n, 1, 1)``."""
    if name == "Brightness":
        return _blend(torch.zeros_like(values), values, amount)
    if name == "Contrast":
        mean = (_grey(images).float().mean((1, 2)) + 0.5).floor()[:, None, None]
        return _blend(mean, values, amount)
    if name == "Posterize":
        step = 2 ** (8 - amount)
        return ((values / step).floor() * step).to(torch.uint8)
    if name == "Solarize":
        return torch.where(values < amount, values, 255 - values).to(torch.uint8)
    if name == "SolarizeAdd":
        return torch.where(values < 128, (values + amount).clamp(max=255), values).to(torch.uint8)
    if name == "Invert":
        return (255 - values).to(torch.uint8)
    if name == "AutoContrast":
        return _stretched(images, values)
    if name == "Equalize":
        return _equalized(images, values)
    raise ValueError(f"no table of {name!r}")


def _stretched(images: Tensor, values: Tensor) -> Tensor:
    """Tables of Pillow's autocontrast: the darkest value becomes 0 and the brightest 255."""
    low = images.flatten(2).amin(2).float()[..., None]
    high = images.flatten(2).amax(2).float()[..., None]
    scale = 255 / (high - low).clamp(min=1)
    # 1e-4 keeps whole results whole where the two products round differently
    stretched = (values * scale - low * scale + 1e-4).floor().clamp(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _equalized(images: Tensor, values: Tensor) -> Tensor:
    """Tables of Pillow's histogram equalisation."""
    flat = images.flatten(0, 1).flatten(1).long()
    counts = torch.zeros(len(flat), 256, device=images.device).scatter_add_(
        1, flat, torch.ones_like(flat).float()
    )
    brightest = counts.gather(1, flat.amax(1, keepdim=True))  # pixels of the brightest value
    step = ((counts.sum(1, keepdim=True) - brightest) / 255).floor()
    before = counts.cumsum(1) - counts
    equal = ((step / 2).floor() + before).div(step.clamp(min=1)).floor().clamp(max=255)
    return torch.where(step > 0, equal, values).to(torch.uint8).view(len(images), 3, 256)


def _grey(images: Tensor) -> Tensor:
    """Pillow's luma, ``(n, H, W)`` uint8."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 2**15) >> 16).to(torch.uint8)


def _smoothed(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter; pixels at the border keep their values."""
    pixels, result = images.float(), images.clone()
    if min(images.shape[2:]) < 3:
        return result
    window = F.avg_pool2d(pixels, 3, stride=1, divisor_override=1) + 4 * pixels[:, :, 1:-1, 1:-1]
    result[:, :, 1:-1, 1:-1] = (window / _SMOOTH + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return result


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``other + factor (images - other)`` as Pillow blends: clipped and truncated to uint8."""
    mixed = other.float() + factor * (images.float() - other.float())
    return (mixed + 1e-4).clamp_(0, 255).to(torch.uint8)
