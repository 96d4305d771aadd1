"""Finds a model's prefix tokens and patch grid from a dry run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from bvit_interp.errors import UserError, choices
from bvit_interp.models.layout import KINDS, Layout

_NAMES = {
    "cls": ("cls_token", "class_token", "class_embedding", "cls"),
    "dist": ("dist_token", "distillation_token"),
    "reg": ("reg_token", "register_tokens", "reg_tokens", "registers"),
}
"""Kind of prefix token -> names of its parameter in timm, torchvision and Hugging Face."""


def find_layout(
    model: nn.Module,
    images: Tensor,
    tokens: Tensor,
    num_classes: int,
    prefix: Sequence[str] | None,
    grid: tuple[int, int] | None,
    fixed: Sequence[bool] = (),
) -> Layout:
    """The layout of a model, from what a dry run of two images showed.

    Parameters
    ----------
    tokens : what enters the first step, ``(2, N, D)``.
    num_classes : number of classes of the logits, 0 for features.
    prefix : kinds of the tokens before the patches, if they are known.
    grid : rows and columns of patches, if they are known.
    fixed : for each of N tokens, whether it is the same for both images, at the first module that
        gets N tokens.

    Raises
    ------
    UserError
        For a state of another shape, an unknown kind of token, prefix tokens that do not come
        first, or a number of patches that is not clear.
    """
    check_state(tuple(tokens.shape), len(images))
    count, width = tokens.shape[1:]
    grid = grid or _patch_grid(model, images)
    named = _named_prefix(model, width)
    if prefix is None:
        number = count - math.prod(grid) if grid and math.prod(grid) <= count else len(named)
        prefix = named if len(named) == number else ("reg",) * number
    prefix = (prefix,) if isinstance(prefix, str) else tuple(prefix)
    if unknown := [kind for kind in prefix if kind not in KINDS]:
        raise UserError(f"prefix: no kind {unknown[0]!r}; kinds: {', '.join(KINDS)}")
    patches = count - len(prefix)
    if grid is None:
        grid = (math.isqrt(max(patches, 0)),) * 2
    if math.prod(grid) != patches or not patches:
        raise UserError(
            f"the state has {count} tokens, {len(prefix)} of them before the patches, and the"
            f" patches are not {grid[0]} x {grid[1]}: give grid=(rows, columns) and prefix=(kinds)"
        )
    _check_first(fixed, len(prefix))
    size = (images.shape[-2], images.shape[-1])
    return Layout(size, images.shape[1], grid, prefix, width, num_classes)


def check_state(shape: tuple[int, ...], images: int) -> None:
    """Refuse a state that is not ``(batch, tokens, width)``."""
    if len(shape) != 3 or shape[0] != images:
        turned = len(shape) == 3 and shape[1] == images
        raise UserError(
            f"the block reads a state of shape {shape} for {images} images, not"
            " (batch, tokens, width)" + (": build it with batch_first=True" if turned else "")
        )


def _check_first(fixed: Sequence[bool], count: int) -> None:
    """Refuse prefix tokens that do not come first: they are the same for every image."""
    if not any(fixed) or all(fixed):
        return  # the tokens are mixed already, or none depends on the image yet
    where = [i for i, same in enumerate(fixed) if same]
    if where != list(range(count)):
        raise UserError(
            f"the tokens that do not depend on the image are {choices(map(str, where), 8)}, so the"
            f" first {count} are not all of the prefix: prefix tokens have to come first, and"
            " prefix=(kinds) names them"
        )


def _named_prefix(model: nn.Module, width: int) -> tuple[str, ...]:
    """The prefix by the names of parameters, in the usual order: cls, dist, reg."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        for kind, names in _NAMES.items():
            if name.rpartition(".")[2] in names and parameter.numel() % width == 0:
                found.setdefault(kind, parameter.numel() // width)
    return tuple(kind for kind in KINDS for _ in range(found.get(kind, 0)))


def _patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches, by the first convolution whose stride is its kernel; or None."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride != (1, 1):
            if isinstance(module.padding, str):
                return None
            steps = zip(
                images.shape[-2:], module.padding, module.kernel_size, module.stride, strict=True
            )
            rows, columns = (
                (size + 2 * int(padding) - kernel) // stride + 1
                for size, padding, kernel, stride in steps
            )
            return rows, columns
    return None
