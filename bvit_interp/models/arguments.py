"""Finds and replaces the tokens in the arguments of a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.nested import Path, at_path, first_tensor, put, with_first

_PATH = "_path_to_tokens"


def tokens_of(block: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
    """The tokens in the arguments of a block: at the path from `tell`, else `first_tensor`."""
    given = [args, kwargs]
    path = getattr(block, _PATH, None)
    try:
        found: Tensor | None = first_tensor(given) if path is None else at_path(given, path)
    except KeyError:
        raise _called_otherwise(block) from None
    return found


def with_tokens(block: nn.Module, args: Any, kwargs: Any, tokens: Any) -> list[Any]:
    """``[args, kwargs]`` with `tokens` in the place of those that `tokens_of` finds."""
    given = [args, kwargs]
    path = getattr(block, _PATH, None)
    try:
        changed = with_first(given, tokens) if path is None else put(given, path, tokens)
    except KeyError:
        raise _called_otherwise(block) from None
    return list(changed)


def tell(blocks: Iterable[nn.Module], paths: Sequence[Path | None]) -> None:
    """Store in each block the path to its tokens, from `bvit_interp.models.token_state`."""
    for block, path in zip(blocks, paths, strict=True):
        if path is not None:
            setattr(block, _PATH, path)


def _called_otherwise(block: nn.Module) -> UserError:
    return UserError(
        f"this {type(block).__name__} is called with other arguments than in the dry run, so it is"
        " not clear which is the token state"
    )
