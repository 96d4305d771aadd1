"""Tensors in nested arguments and results of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor, or stands for one while torch.fx traces."""
    return isinstance(value, (Tensor, torch.fx.Proxy))


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in there, or None."""
    if is_tensor(values):
        return values  # type: ignore[no-any-return]
    found = (first_tensor(each) for each in _items(values).values())
    return next((tensor for tensor in found if tensor is not None), None)


def with_first(values: Any, tensor: Any) -> Any:
    """The same with another first tensor."""
    if is_tensor(values):
        return tensor
    items = _items(values)
    first = next(key for key, each in items.items() if first_tensor(each) is not None)
    return _like(values, {**items, first: with_first(items[first], tensor)})


def map_tensors(values: Any, change: Callable[[Any], Any]) -> Any:
    """The same with every tensor changed."""
    if is_tensor(values):
        return change(values)
    items = _items(values)
    return _like(values, {key: map_tensors(each, change) for key, each in items.items()})


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
