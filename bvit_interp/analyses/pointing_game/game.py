"""The pointing game on saliency maps and masks: hits and their nulls.

Zhang et al., ECCV 2016. How ties, ignored pixels and images without an object count is ours; see
`metrics.point_hits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, Real, UInt8
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bvit_interp import metrics
from bvit_interp.vocabulary import IGNORE

Masks = Bool[Tensor, "batch height width"]
_LUMA = (299, 587, 114)
"""Thousandths of red, green and blue in the luma of ITU-R 601. Whole numbers keep ties."""


@dataclass(frozen=True)
class Hits:
    """Scores of B images."""

    hits: Float[Tensor, " batch *maps"]
    """Hit of each map, 0..1; nan where its maximum is on ignored pixels, or without an object."""
    has_object: Bool[Tensor, " batch"]
    """Whether an object is in the image."""
    chance: Float[Tensor, " batch"]
    """Share of the image that is object, 0..1; with ``point="majority"``, of the patches."""
    centre: Float[Tensor, " batch"]
    """Hit of the image's centre pixel, 0 or 1; nan where it is ignored."""
    objects: Masks
    """The object's pixels."""
    patches: Float[Tensor, "batch patches"]
    """Whether a point in the patch is a hit, 0 or 1; nan where it is ignored."""
    points: Int64[Tensor, "points 3"]
    """Image, map and patch of every maximum that is not ignored; maps are counted row by row."""


def play(
    maps: Real[Tensor, "batch *maps patches"],
    ids: Int[Tensor, "batch height width"],
    labels: Int[Tensor, " batch"],
    grid: tuple[int, int],
    *,
    target: Literal["own", "any"] = "own",
    point: Literal["centre", "majority"] = "centre",
    tolerance: float = 0.0,
) -> Hits:
    """Score saliency maps of the patches.

    Parameters
    ----------
    maps : only the position of the maximum counts.
    ids : masks; 0 background, label + 1 an object of that class, 1000 ignored.
    labels : the images' own classes.
    grid : patch rows and columns.
    target : the object to hit, of the image's own class or of any class.
    point : criterion of a hit: the patch's centre pixel is on the object, or more than half of the
        patch is.
    tolerance : radius around the point within which an object pixel counts, pixels.
    """
    objects, ignored = _objects(ids, labels, target), ids == IGNORE
    on_patches = _majority if point == "majority" else metrics.at_patch_centres
    targets = metrics.dilate(objects, tolerance)
    patch_targets, patch_ignored = on_patches(targets, grid), on_patches(ignored, grid)
    has_object = objects.flatten(1).any(1)
    hits = metrics.point_hits(maps, patch_targets, patch_ignored)
    hits[~has_object] = torch.nan
    middle = (slice(None), ids.shape[1] // 2, ids.shape[2] // 2)
    flat = maps.reshape(len(maps), -1, maps.shape[-1])
    maxima = (flat == flat.amax(-1, keepdim=True)) & ~patch_ignored[:, None]
    return Hits(
        hits=hits,
        has_object=has_object,
        chance=(
            _share(patch_targets, patch_ignored)
            if point == "majority"
            else _share(targets, ignored)
        ),
        centre=torch.where(ignored[middle], torch.nan, targets[middle].double()),
        objects=objects,
        patches=torch.where(patch_ignored, torch.nan, patch_targets.double()),
        points=maxima.nonzero(),
    )


def brightness(
    pixels: UInt8[Tensor, "batch height width 3"], grid: tuple[int, int]
) -> Int64[Tensor, "batch 2 patches"]:
    """Two maps without a model: mean luminance of each patch, and its variance within the patch.

    Both are in units of their own, as whole numbers: equal patches are ties.
    """
    rows, columns = grid
    p, q = pixels.shape[1] // rows, pixels.shape[2] // columns
    weights = torch.tensor(_LUMA, device=pixels.device)
    luma = (pixels[:, : rows * p, : columns * q].long() * weights).sum(-1)
    cells = luma.reshape(-1, rows, p, columns, q).transpose(2, 3)
    patches = cells.reshape(-1, rows * columns, p * q)
    total = patches.sum(-1)
    variance = patches.shape[-1] * (patches**2).sum(-1) - total**2
    return torch.stack([total, variance], dim=1)


def on_other_masks(
    points: Int[np.ndarray, "points 3"],
    patches: Float[np.ndarray, "images patches"],
    maps: int,
) -> tuple[Float[np.ndarray, "images maps"], Float[np.ndarray, "images maps"]]:
    """Score points with the masks of all other images.

    What a point scores there is due to where objects usually are, not to the image it is from.

    Parameters
    ----------
    points : image, map and patch of every maximum, as in `Hits`; several maxima of a map share it.
    patches : whether a point in the patch is a hit, 0 or 1; nan where it is ignored.
    maps : number of maps per image.

    Returns
    -------
    others : for each image and map, the share of the other images whose object is at its point;
        nan without a point, and without another image that is not ignored there.
    moved : for each image, by how much its mask moves the mean of `others` over the images: the
        sum over its deviations from the mean mask, times the share of the points that lie there.
        Its mean over the images is 0. An interval over images needs it, since every mask is used
        for all other images.
    """
    images, size = patches.shape
    image, number, patch = points.T
    of_map = image * maps + number
    maxima = np.bincount(of_map, minlength=images * maps)
    share = 1 / maxima[of_map]
    there = ~np.isnan(patches)
    on = np.where(there, patches, 0.0)
    hits, seen = on.sum(0), there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        elsewhere = (hits[patch] - on[image, patch]) / (seen[patch] - there[image, patch])
        scores = np.bincount(of_map, share * elsewhere, images * maps)
        others = np.where(maxima > 0, scores, np.nan).reshape(images, maps)
        pointed = np.bincount(number * size + patch, share, maps * size).reshape(maps, size)
        pointed = pointed / pointed.sum(1, keepdims=True)
        deviation = np.where(there, (on - hits / seen) * images / seen, 0.0)
    return others, deviation @ pointed.T


def _objects(
    ids: Int[Tensor, "batch height width"], labels: Int[Tensor, " batch"], target: str
) -> Masks:
    if target == "own":
        return ids == labels[:, None, None] + 1
    return (ids > 0) & (ids != IGNORE)


def _majority(mask: Masks, grid: tuple[int, int]) -> Bool[Tensor, "batch patches"]:
    """The patches more than half of whose pixels are set."""
    return adaptive_avg_pool2d(mask[:, None].float(), grid).flatten(1) > 0.5


def _share(mask: Bool[Tensor, " batch *space"], ignored: Bool[Tensor, " batch *space"]) -> Tensor:
    """Share ``(B,)`` of the elements that are set, among those not ignored."""
    counted = (~ignored).flatten(1).sum(1).clamp(min=1)
    return (mask & ~ignored).flatten(1).sum(1) / counted
