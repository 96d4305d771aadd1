"""Crop, flip and resize a batch, each image by its own box.

A separable resize is one matrix per axis: ``out = rows @ image @ columns.T``. The weights are those
of the antialiased bilinear filter of Pillow and torch inside the box. An image cropped here equals
``torchvision.transforms.v2.functional.resized_crop`` up to one grey level. A CPU gains nothing from
a whole batch at once: there, torch's own filter resizes one image after another, which is six times
as fast.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from bvit_interp.training.loop.draws import to_device

TRIES = 10  # boxes that are drawn until one lies inside the image, as in torchvision
WIDTH = 2 * TRIES + 3  # random numbers per crop: areas, ratios, a position (2), a flip
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def random_boxes(
    draws: Float[np.ndarray, "batch numbers"], size: tuple[int, int]
) -> Int[np.ndarray, "batch 4"]:
    """Boxes of torchvision's `RandomResizedCrop`: top, left, height and width.

    The area is uniform in `AREA`, the ratio log-uniform in `RATIO`. If none of `TRIES` boxes fits,
    the box is the largest centred one whose ratio is allowed.

    Parameters
    ----------
    draws : uniform numbers, at least `WIDTH` per image.
    size : height and width of the images, pixels.
    """
    image_height, image_width = size
    area = image_height * image_width * (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :TRIES])
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first_fit = fits.argmax(1)[:, None]
    none_fits = ~fits.any(1)
    largest = _largest_box(size)
    height = np.where(none_fits, largest[0], np.take_along_axis(heights, first_fit, 1)[:, 0])
    width = np.where(none_fits, largest[1], np.take_along_axis(widths, first_fit, 1)[:, 0])
    free = np.stack([image_height - height, image_width - width], 1)
    position = draws[:, 2 * TRIES : 2 * TRIES + 2]
    corner = np.where(none_fits[:, None], free // 2, (position * (free + 1)).astype(np.int64))
    return np.concatenate([corner, height[:, None], width[:, None]], 1)


def _largest_box(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest box inside an image whose ratio is allowed."""
    height, width = size
    if width / height < RATIO[0]:
        return round(width / RATIO[0]), width
    return height, round(height * min(width / height, RATIO[1]))


def padded_boxes(
    draws: Float[np.ndarray, "batch numbers"], size: tuple[int, int]
) -> Int[np.ndarray, "batch 4"]:
    """Boxes of the images' own size, shifted by up to an eighth of the height in each direction."""
    pad = size[0] // 8
    corner = (draws[:, 2 * TRIES : 2 * TRIES + 2] * (2 * pad + 1)).astype(np.int64) - pad
    return np.concatenate([corner, np.broadcast_to(size, corner.shape)], 1)


def whole_boxes(
    draws: Float[np.ndarray, "batch numbers"], size: tuple[int, int]
) -> Int[np.ndarray, "batch 4"]:
    """Boxes that hold the whole images."""
    return np.broadcast_to(np.array([0, 0, *size]), (len(draws), 4))


def flips(
    draws: Float[np.ndarray, "batch numbers"], probability: float
) -> Bool[np.ndarray, " batch"]:
    """Which images to mirror."""
    return draws[:, WIDTH - 1] < probability


def cut(
    images: UInt8[Tensor, "batch 3 height width"],
    boxes: Int[np.ndarray, "batch 4"],
    mirrored: Bool[np.ndarray, " batch"],
    size: tuple[int, int],
) -> UInt8[Tensor, "batch 3 out_height out_width"]:
    """Each image's box at `size`; pixels outside an image are black.

    Parameters
    ----------
    images : on any device; the result is on the same one.
    boxes : top, left, height and width, pixels.
    mirrored : which images to mirror.
    size : height and width of the result, pixels.
    """
    height, width = images.shape[2:]
    resizes = (boxes[:, 2:] != size).any()
    if images.device.type == "cpu" and resizes:
        return _cut_by_filter(images, boxes, mirrored, size)
    if not resizes and not mirrored.any() and (boxes == (0, 0, height, width)).all():
        return images
    return _cut_by_matrices(images, boxes, mirrored, size)


def inside_boxes(
    boxes: Int[np.ndarray, "batch 4"], size: tuple[int, int], device: torch.device
) -> Bool[Tensor, "batch 1 height width"]:
    """Which pixels of images of this size lie in their image's box."""
    top, left, height, width = to_device(boxes, device)[:, None, None, :].unbind(-1)
    rows = torch.arange(size[0], device=device)[:, None]
    columns = torch.arange(size[1], device=device)
    vertical = (rows >= top[..., None]) & (rows < (top + height)[..., None])
    return vertical & (columns >= left[..., None]) & (columns < (left + width)[..., None])


def _cut_by_filter(
    images: Tensor, boxes: np.ndarray, mirrored: np.ndarray, size: tuple[int, int]
) -> Tensor:
    """One image after another with torch's filter; boxes lie inside the images."""
    resized = torch.cat(
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
    return torch.where(torch.from_numpy(mirrored)[:, None, None, None], resized.flip(3), resized)


def _cut_by_matrices(
    images: Tensor, boxes: np.ndarray, mirrored: np.ndarray, size: tuple[int, int]
) -> Tensor:
    """All images at once, with two matrices per image."""
    height, width = images.shape[2:]
    # only the part of the images that some box of the batch touches takes part in the products
    top, left = np.maximum(boxes[:, :2].min(0), 0).tolist()
    bottom, right = np.minimum((boxes[:, :2] + boxes[:, 2:]).max(0), (height, width)).tolist()
    rows = _weights(boxes[:, 0], boxes[:, 2], size[0], range(top, bottom), images.device)
    columns = _weights(boxes[:, 1], boxes[:, 3], size[1], range(left, right), images.device)
    if mirrored.any():
        mirror = to_device(mirrored, images.device)[:, None, None]
        columns = torch.where(mirror, columns.flip(1), columns)
    part = images[:, :, top:bottom, left:right].float()
    # rows first: (B, out, H) @ (B, H, 3 W), then (B, 3 out, W) @ (B, W, out)
    tall = rows @ part.permute(0, 2, 1, 3).flatten(2)
    tall = tall.unflatten(2, (3, right - left)).transpose(1, 2).flatten(1, 2)
    resized = (tall @ columns.transpose(1, 2)).unflatten(1, (3, size[0]))
    return resized.add_(0.5).clamp_(0, 255).to(torch.uint8)


def _weights(
    begin: np.ndarray, length: np.ndarray, out: int, pixels: range, device: torch.device
) -> Tensor:
    """Weights of the source pixels `pixels` in each of `out` pixels of one axis.

    Returns
    -------
    ``(B, out, pixels)`` float32; each row adds up to 1, or is zero beyond the image.
    """
    starts = to_device(begin.astype(np.float32), device)[:, None, None]
    lengths = to_device(length.astype(np.float32), device)[:, None, None]
    scale = lengths / out
    out_centres = starts + (torch.arange(out, device=device)[:, None] + 0.5) * scale
    centres = torch.arange(pixels.start, pixels.stop, device=device) + 0.5
    weights = (1 - (centres - out_centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((centres > starts) & (centres < starts + lengths))
    # a box that reaches beyond the image is never resized: each weight there is 1 or 0
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
