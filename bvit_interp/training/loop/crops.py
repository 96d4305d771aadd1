"""Crop, flip and resize of a batch on any device: each image has its own box, and two small
matrices.

A separable resize is a matrix for each axis: ``out = rows @ image @ columns.T``. Its weights are
those of Pillow's and torch's antialiased bilinear filter inside the box, so an image cut here is
that of ``torchvision.transforms.v2.functional.resized_crop`` up to the rounding of a grey level. A
CPU gains nothing from whole batches: it takes torch's own filter image by image where anything is
resized, which is six times as fast.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bvit_interp.training.loop.draws import sent

TRIES = 10  # boxes drawn until one lies inside the image, as torchvision does
WIDTH = 2 * TRIES + 3  # random numbers that a crop takes: areas, ratios, two places, a flip
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def random_boxes(draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes of torchvision's `RandomResizedCrop`, ``(B, 4)`` int64: top, left, height, width.

    Area uniform in `AREA`, ratio log-uniform in `RATIO`; where none of `TRIES` fits, the largest
    centred box of an allowed ratio.

    Parameters
    ----------
    draws : uniform numbers ``(B, WIDTH)``.
    size : height and width of the images.
    """
    high, wide = size
    area = high * wide * (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :TRIES])
    low, up = np.log(RATIO)
    ratio = np.exp(low + (up - low) * draws[:, TRIES : 2 * TRIES])
    widths, heights = (
        np.rint(np.sqrt(part)).astype(np.int64) for part in (area * ratio, area / ratio)
    )
    fits = (widths > 0) & (widths <= wide) & (heights > 0) & (heights <= high)
    chosen = fits.argmax(1)[:, None]
    height, width = (np.take_along_axis(sides, chosen, 1)[:, 0] for sides in (heights, widths))
    within = wide / high
    fallback = (
        (round(wide / RATIO[0]), wide)
        if within < RATIO[0]
        else (high, round(high * min(within, RATIO[1])))
    )
    none = ~fits.any(1)
    height, width = np.where(none, fallback[0], height), np.where(none, fallback[1], width)
    places = draws[:, 2 * TRIES : 2 * TRIES + 2]
    free = np.stack([high - height, wide - width], 1)
    corner = np.where(none[:, None], free // 2, (places * (free + 1)).astype(np.int64))
    return np.concatenate([corner, height[:, None], width[:, None]], 1)


def padded_boxes(draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes of the images' own size that reach up to an eighth of the height beyond them, ``(B,
    4)`` int64."""
    pad = size[0] // 8
    corner = (draws[:, 2 * TRIES : 2 * TRIES + 2] * (2 * pad + 1)).astype(np.int64) - pad
    return np.concatenate([corner, np.broadcast_to(size, corner.shape)], 1)


def whole_boxes(draws: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The whole images, ``(B, 4)`` int64."""
    return np.broadcast_to(np.array([0, 0, *size]), (len(draws), 4))


def cut(images: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Each image's box at `size`, mirrored where `flips` says; what lies beyond the image is black.

    Parameters
    ----------
    images : ``(B, 3, H, W)`` uint8, on any device.
    boxes : top, left, height, width ``(B, 4)``, pixels.
    flips : ``(B,)`` bool.
    size : height and width of the result, pixels.

    Returns
    -------
    ``(B, 3, *size)`` uint8 on the same device.
    """
    high, wide = images.shape[2:]
    resizes = (boxes[:, 2:] != size).any()
    if images.device.type == "cpu" and resizes:
        return _filtered(images, boxes, flips, size)
    if not resizes and not flips.any() and (boxes == (0, 0, high, wide)).all():
        return images
    return _multiplied(images, boxes, flips, size)


def _filtered(
    images: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int]
) -> Tensor:
    """One image after the other, by torch's filter; boxes lie inside the images."""
    small = torch.cat(
        [
            F.interpolate(
                image[None, :, top : top + height, left : left + width],
                size,
                mode="bilinear",
                antialias=True,
            )
            for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True)
        ]
    )
    mirrored = torch.from_numpy(flips)[:, None, None, None]
    return torch.where(mirrored, small.flip(3), small)


def _multiplied(
    images: Tensor, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int]
) -> Tensor:
    """All at once, by two matrices an image; what lies beyond an image is black."""
    (high, wide), device = images.shape[2:], images.device
    upright = not flips.any()
    # what no box of the batch touches takes no part in the products
    top, left = np.maximum(boxes[:, :2].min(0), 0).tolist()
    bottom, right = np.minimum((boxes[:, :2] + boxes[:, 2:]).max(0), (high, wide)).tolist()
    rows = _weights(boxes[:, 0], boxes[:, 2], size[0], range(top, bottom), device)
    columns = _weights(boxes[:, 1], boxes[:, 3], size[1], range(left, right), device)
    if not upright:
        mirrored = sent(flips, device)[:, None, None]
        columns = torch.where(mirrored, columns.flip(1), columns)
    part = images[:, :, top:bottom, left:right].float()
    # rows first: (B, out, H) @ (B, H, 3 W), then (B, 3 out, W) @ (B, W, out)
    tall = rows @ part.permute(0, 2, 1, 3).flatten(2)
    tall = tall.unflatten(2, (3, right - left)).transpose(1, 2).flatten(1, 2)
    small = (tall @ columns.transpose(1, 2)).unflatten(1, (3, size[0]))
    return small.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _weights(
    begin: np.ndarray, length: np.ndarray, out: int, pixels: range, device: torch.device
) -> Tensor:
    """What each of `out` pixels takes from source pixels `pixels` on one axis, ``(B, out, pixels)``
    float32."""
    starts, lengths = (
        sent(part.astype(np.float32), device)[:, None, None] for part in (begin, length)
    )
    scale = lengths / out
    centres = starts + (torch.arange(out, device=device)[:, None] + 0.5) * scale
    centre_of = torch.arange(pixels.start, pixels.stop, device=device) + 0.5
    weights = (1 - (centre_of - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((centre_of > starts) & (centre_of < starts + lengths))
    # a box beyond the image is never resized, there each pixel has the weight 1 or none
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
