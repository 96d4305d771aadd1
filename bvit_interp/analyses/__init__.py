"""What is asked of a model: a folder per question.

Each folder holds

- ``__init__.py``: the question, `Config` (its options), `COLUMNS` (its table) and `QUICK` (small
  options); imports nothing heavy;
- ``measure.py``: ``measure(models, data, config) -> DataFrame`` and ``summary(frame)``;
- ``plot.py``: ``plot(frame) -> Figure``, from the table alone;
- its instruments, for use on their own.

    from bvit_interp.analyses import ablation

    frame = ablation.measure(models, data, ablation.Config(limit=1000))
    figure = ablation.plot(frame)

`measure`, `summary` and `plot` are loaded on first use. `measure` takes as data
what `bvit_interp.data.adapters.as_samples` takes. `plot` names the columns that
a table lacks.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import lazy_loader

from bvit_interp.errors import UserError, choices

if TYPE_CHECKING:
    import pandas as pd

OF_THE_PAPER = (
    "features",
    "pointing_game",
    "pathways",
    "energy_rank",
    "rank_sweep",
    "step_accuracy",
    "trajectories",
    "dynamics",
    "evaluate",
    "early_exit",
    "attention",
    "cost",
)
"""The questions of bViT's figures, then of its tables."""
THROUGH_TIME = (
    "selectivity",
    "patching",
    "ablation",
    "lens",
    "stability",
    "step_attribution",
    "schedule",
    "circuits",
)
"""Questions that one block at every step makes possible; not in the paper."""
ANALYSES = OF_THE_PAPER + THROUGH_TIME


class _Question(ModuleType):
    """A folder whose `measure` and `plot` are the functions, also once their modules are loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WRAPPERS and isinstance(value, ModuleType):
            value = _WRAPPERS[name](self, getattr(value, name))
        super().__setattr__(name, value)


def _of_any_data(question: ModuleType, measure: Callable[..., Any]) -> Callable[..., Any]:
    """The `measure` of a question, which gets its data as `Samples`, or as None where it may."""
    adapters = importlib.import_module("bvit_interp.data.adapters")
    may_be_none = NoneType in get_args(get_type_hints(measure)["data"])

    @functools.wraps(measure)
    def of_any(models: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        samples = None if data is None and may_be_none else adapters.as_samples(data)
        return measure(models, samples, *args, **kwargs)

    return of_any


def _checked(question: ModuleType, plot: Callable[..., Any]) -> Callable[..., Any]:
    """The `plot` of a question, with an error that names the columns that a table lacks."""
    word = question.__name__.rpartition(".")[2]

    @functools.wraps(plot)
    def checked(frame: pd.DataFrame) -> Any:
        try:
            return plot(frame)
        except (KeyError, AttributeError) as error:
            missing = [name for name in question.COLUMNS if name not in frame]
            if not missing:
                raise
            raise UserError(
                f"{word}: the table lacks {choices(missing, 40)}; it may be of another version:"
                f" measure again with bvit-interp {word.replace('_', '-')}"
            ) from error

    return checked


_WRAPPERS = {"measure": _of_any_data, "plot": _checked}


def attach(
    package: str,
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a question: its functions on first use."""
    module = sys.modules[package]
    module.__class__ = _Question
    getattribute, _, names = lazy_loader.attach(
        package, submod_attrs={"measure": ["measure", "summary"], "plot": ["plot"]}
    )

    def get(name: str) -> Any:
        value = getattribute(name)
        if name in _WRAPPERS:  # lazy_loader has put the function itself in its place
            setattr(module, name, sys.modules[f"{package}.{name}"])
            return vars(module)[name]
        return value

    return get, lambda: sorted({*vars(module), *names}), names
