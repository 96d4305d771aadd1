"""The pointing game on saliency maps and masks: hits and their nulls.

Zhang et al., ECCV 2016. How ties, ignored pixels and images without an object count is ours; see
`metrics.point_hits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bvit_interp import metrics
from bvit_interp.vocabulary import IGNORE

Masks = Bool[Tensor, "batch height width"]


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


def play(
    maps: Float[Tensor, "batch *maps patches"],
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
    )


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
