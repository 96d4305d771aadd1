"""Parts of a saved training state, checked while they are read.

Each function raises a ValueError, TypeError, KeyError or RuntimeError for a value that cannot be
right. The caller, who knows the file, turns it into a message of one line.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def whole(state: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """A whole number of a state, in low..high."""
    value = state[key]
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{key} must be a whole number in {low}..{high}, got {_shown(value)}")
    return value


def number(state: Mapping[str, Any], key: str) -> float:
    """A finite number of a state."""
    value = state[key]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {_shown(value)}")
    return float(value)


def word(state: Mapping[str, Any], key: str, words: Collection[str]) -> str:
    """One of the given words."""
    value = state[key]
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{key} must be {' or '.join(words)}, got {_shown(value)}")
    return value


def rows(state: Mapping[str, Any], columns: Collection[str] | None) -> list[dict[str, float]]:
    """A history: rows of numbers, NaN where there is none, under these columns (None: any)."""
    history = state["history"]
    if not isinstance(history, list):
        raise ValueError(f"history must be a list of rows, got {_shown(history)}")
    for i, row in enumerate(history, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {i} of the history is {_shown(row)}")
        if columns is not None and set(row) != set(columns):
            lacking = sorted(set(columns) - set(row))
            why = f"lacks {', '.join(lacking)}" if lacking else "has other columns"
            raise ValueError(f"row {i} of the history {why}")
        wrong = [key for key, value in row.items() if type(value) not in (int, float)]
        if wrong:
            raise ValueError(f"row {i} of the history: {wrong[0]} is {_shown(row[wrong[0]])}")
    return history


def load_tensors(into: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy tensors by name; names and shapes must agree."""
    if set(into) != set(saved):
        raise ValueError("it has the tensors of another model")
    for name, tensor in into.items():
        if saved[name].shape != tensor.shape:
            found, wanted = tuple(saved[name].shape), tuple(tensor.shape)
            raise ValueError(f"{name} is {found} for {wanted}")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Call `optimizer.load_state_dict`, and check shapes and types, which it does not."""
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        for key, value in old.items():
            if key != "params" and _kind(group.get(key)) != _kind(value):
                raise ValueError(f"optimizer: {key} is {_shown(group.get(key))}")
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            fits = isinstance(value, Tensor) and value.shape in ((), (1,), parameter.shape)
            if not fits and type(value) not in (int, float):
                raise ValueError(f"optimizer: {key} does not fit a parameter")


def _kind(value: Any) -> object:
    """The kind of an optimizer's setting; a flag may be unset."""
    if value is None or isinstance(value, bool):
        return "flag"
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return "number"
    return type(value)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."
