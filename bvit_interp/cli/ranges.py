"""Ranges of numbers on the command line, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from bvit_interp.errors import UserError

_WHOLE = (-(10**9), 10**9)
_REAL = (0.0, 1e9)
_STEPS = (-10_000, 10_000)
_RANGES: dict[str, tuple[float, float]] = {
    "activation_weight": (-1e9, 1e9),
    "batch_size": (1, 10**6),
    "bins": (1, 10**5),
    "chunk_size": (1, 10**4),
    "clusters": (1, 10**4),
    "count": (1, 10**6),
    "draws": (0, 10**6),
    "epochs": (1, 10**6),
    "graft_epochs": (0, 10**6),
    "groups": (0, 10**6),
    "images_at_once": (1, 10**6),
    "iterations": (1, 10**6),
    "jacobian_steps": _STEPS,
    "jitter": (0, 8192),
    "leading": (1, 1000),
    "n_copies": (1, 1000),
    "n_examples": (0, 10**4),
    "n_matrix": (0, 10**5),
    "n_timed": (0, 10**6),
    "n_top": (0, 1000),
    "neighbours": (1, 10**5),
    "pair_steps": _STEPS,
    "random_units": (0, 10**6),
    "rank": (1, 65_536),
    "resize": (1, 8192),
    "retrain_epochs": (1, 10**6),
    "rewind": (0, 10**8),
    "rounds": (1, 1000),
    "runs": (0, 10_000),
    "save_minutes": (0, 1e6),
    "seed": (0, 2**32 - 1),
    "seeds": (0, 2**32 - 1),
    "shifts": _STEPS,
    "shuffles": (0, 10_000),
    "starts": _STEPS,
    "steps": _STEPS,
    "threads": (1, 1024),
    "timed_batch": (1, 10**6),
    "train_batch": (1, 65_536),
    "workers": (0, 256),
}
"""Options that cost memory or time in proportion, or that a library limits. A command may be
stricter; the others share `_WHOLE` and `_REAL`."""


def check(groups: Mapping[str, Any]) -> None:
    """Refuse numbers that are not finite, or beyond what any machine could do.

    Parameters
    ----------
    groups : dataclasses of options, by any name.

    Raises
    ------
    UserError
        For the first such number; the line names the option and its range.
    """
    for group in groups.values():
        for field in fields(group):
            for value in _numbers(getattr(group, field.name)):
                low, high = _RANGES.get(field.name, _REAL if isinstance(value, float) else _WHOLE)
                if not (math.isfinite(value) and low <= value <= high):
                    flag = field.name.replace("_", "-")
                    raise UserError(f"--{flag} takes {_shown(low)} to {_shown(high)}, got {value}")


def _shown(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:g}"


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _numbers(each)
