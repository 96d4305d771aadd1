"""Tensors in nested arguments and results of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
"""Keys and positions that lead to a tensor."""


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor, or stands for one while torch.fx traces."""
    return isinstance(value, (Tensor, torch.fx.Proxy))


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor of three axes or more (the tokens), else the first tensor, or None."""
    path = _path(values)
    return None if path is None else at_path(values, path)


def with_first(values: Any, tensor: Any) -> Any:
    """`values` with another tensor in the place of `first_tensor`."""
    path = _path(values)
    return values if path is None else put(values, path, tensor)


def token_paths(values: Any) -> list[Path]:
    """The paths to the tensors of three axes or more, in order."""
    return [path for path in _paths(values, ()) if _has_tokens(at_path(values, path))]


def map_tensors(values: Any, change: Callable[[Any], Any]) -> Any:
    """`values` with every tensor changed."""
    if is_tensor(values):
        return change(values)
    items = _items(values)
    return _like(values, {key: map_tensors(each, change) for key, each in items.items()})


def _path(values: Any) -> Path | None:
    return next(iter(token_paths(values)), next(_paths(values, ()), None))


def _paths(values: Any, before: Path) -> Iterator[Path]:
    """The paths to all tensors, in order."""
    if is_tensor(values):
        yield before
    else:
        for key, each in _items(values).items():
            yield from _paths(each, (*before, key))


def _has_tokens(tensor: Any) -> bool:
    return isinstance(tensor, torch.fx.Proxy) or tensor.ndim >= 3


def at_path(values: Any, path: Path) -> Any:
    """What a path leads to; a KeyError if there is no such path."""
    for key in path:
        values = _items(values)[key]
    return values


def put(values: Any, path: Path, tensor: Any) -> Any:
    """`values` with another tensor at the end of a path."""
    if not path:
        return tensor
    items = _items(values)
    return _like(values, {**items, path[0]: put(items[path[0]], path[1:], tensor)})


def _items(values: Any) -> dict[Any, Any]:
    """What a container holds, by key or position; nothing for anything else."""
    if isinstance(values, dict):
        return dict(values)
    return dict(enumerate(values)) if isinstance(values, (tuple, list)) else {}


def _like(values: Any, items: dict[Any, Any]) -> Any:
    """A container of the kind of `values` that holds `items`."""
    if isinstance(values, dict):
        return type(values)(items.items())
    if not isinstance(values, (tuple, list)):
        return values
    changed: Iterable[Any] = items.values()
    return type(values)(*changed) if hasattr(values, "_fields") else type(values)(changed)
