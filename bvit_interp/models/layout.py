"""The layout of a model: image size, patch grid, tokens, classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from bvit_interp.errors import UserError

KINDS = ("cls", "dist", "reg")
"""Kinds of prefix tokens: CLS, a distillation token, registers."""


@dataclass(frozen=True)
class Layout:
    """The shape of a model's images, tokens and outputs.

    Attributes
    ----------
    image_size : rows and columns of pixels.
    channels : channels of an image.
    grid : rows and columns of patches; patch tokens are in row-major order.
    prefix : kind of each token before the patches: "cls", "dist" or "reg". A token whose kind is
        not known is "reg".
    width : D, width of the token state.
    num_classes : number of classes of the logits; 0 for a model that returns features.
    """

    image_size: tuple[int, int]
    channels: int
    grid: tuple[int, int]
    prefix: tuple[str, ...]
    width: int
    num_classes: int

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens come before the patches."""
        return len(self.prefix)

    @property
    def num_patches(self) -> int:
        """How many patch tokens there are."""
        return math.prod(self.grid)

    @property
    def num_tokens(self) -> int:
        """N, the number of prefix tokens and patches together."""
        return self.num_prefix_tokens + self.num_patches


def layout_of(model: nn.Module) -> Layout:
    """The layout of a `BViT`, a timm `VisionTransformer` or an unroll.

    Raises
    ------
    UserError
        For a `VisionTransformer` that does not say its image size or its grid of patches.
    """
    known = getattr(model, "layout", None)
    if isinstance(known, Layout):
        return known
    vit: Any = model
    cls = int(vit.has_class_token)
    dist = int(getattr(vit, "dist_token", None) is not None)
    registers = vit.num_prefix_tokens - cls - dist
    prefix = ("cls",) * cls + ("dist",) * dist + ("reg",) * registers
    names = ("img_size", "grid_size")
    if lacking := [name for name in names if getattr(vit.patch_embed, name, None) is None]:
        raise UserError(
            f"the {type(vit.patch_embed).__name__} of this {type(vit).__name__} has no"
            f" {' and no '.join(lacking)}: give image_size=, grid= and prefix= to unroll or Probe"
        )
    return Layout(
        image_size=tuple(vit.patch_embed.img_size),
        channels=channels_of(vit),
        grid=tuple(vit.patch_embed.grid_size),
        prefix=prefix,
        width=vit.embed_dim,
        num_classes=vit.num_classes,
    )


def channels_of(model: nn.Module) -> int:
    """Channels of an image: those that the first convolution reads, or 3 without one."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return 3 if first is None else first.in_channels
