"""Finds the steps of a model from a dry run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from bvit_interp.errors import UserError, choices
from bvit_interp.models.dry_run import Ran, counts_of

_LISTS = (nn.ModuleList, nn.Sequential)
_LAYERS = ("torch", "timm")
"""Libraries whose modules without children are layers of a block, not blocks."""


def find_calls(model: nn.Module, runs: Sequence[Ran], loop: str | None) -> list[str]:
    """Path of the block of each call, in order.

    Parameters
    ----------
    model : the model that ran.
    runs : from its `dry_run`.
    loop : path of the block, or of the list of blocks, whose calls are the steps; by default the
        blocks that run more than once, or else the one list of blocks.

    Raises
    ------
    UserError
        If the steps are not clear; the message lists the modules that may be meant.
    """
    counts = counts_of(runs)
    paths = _looped(model, runs) if loop is None else _named(model, runs, loop)
    if not paths:
        paths = _stack(model, runs)
    never = [path for path in paths if not counts[path]]
    if never:
        often = ", ".join(f"{path} ({count})" for path, count in counts.most_common(6))
        raise UserError(f"{choices(never)} never ran in a forward; what ran how often: {often}")
    outer = set(_outermost(paths))
    return [run.path for run in runs if run.path in outer]


def _named(model: nn.Module, runs: Sequence[Ran], loop: str) -> list[str]:
    """The block that `loop` names, or the blocks of the list that it names.

    A Sequential that runs as a whole is one block.
    """
    try:
        named = model.get_submodule(loop)
    except AttributeError:
        lists = [path for path, module in model.named_modules() if isinstance(module, _LISTS)]
        raise UserError(f"no module {loop!r}; lists of modules: {choices(lists)}") from None
    is_list = isinstance(named, nn.ModuleList) or (
        _is_list(named) and counts_of(runs)[loop] < 2 and _one_kind(named)
    )
    return [f"{loop}.{name}" for name, _ in named.named_children()] if is_list else [loop]


def _looped(model: nn.Module, runs: Sequence[Ran]) -> list[str]:
    """The outermost blocks that run more than once, with their neighbours in one list."""
    counts = counts_of(runs)
    often = {run.path: run.module for run in runs if counts[run.path] > 1 and _is_block(run)}
    lists = {path for path, module in often.items() if _is_list(module) and _one_kind(module)}
    outer = _outermost(path for path in often if path not in lists)
    parents = {path.rpartition(".")[0] for path in outer}
    if len(parents) > 1 or len({type(often[path]) for path in outer}) > 1:
        listed = ", ".join(f"{path} ({counts[path]} times)" for path in outer)
        raise UserError(
            f"more than one module runs again and again: {listed}; say which is the block with"
            " loop=PATH, or put what belongs to a step into one module"
        )
    if not outer or not isinstance(model.get_submodule(*parents), _LISTS):
        return outer
    blocks = {run.path for run in runs if _is_block(run)}
    return [path for path in _children(model, *parents) if path in blocks]


def _stack(model: nn.Module, runs: Sequence[Ran]) -> list[str]:
    """The blocks of the one list of blocks, each of which runs once."""
    counts = counts_of(runs)
    again = _outermost(
        run.path
        for run in runs
        if counts[run.path] > 1 and any(each.ndim > 1 for each in run.module.parameters())
    )
    if again:
        listed = ", ".join(f"{path} ({counts[path]} times)" for path in again[:6])
        raise UserError(
            f"what runs again and again is no block that takes and gives tokens (batch, tokens,"
            f" width): {listed}; say which module is the block with loop=PATH"
        )
    blocks = {run.path for run in runs if _is_block(run)}
    lists = {
        path: children
        for path, module in model.named_modules()
        if isinstance(module, _LISTS)
        and (children := _children(model, path))
        and blocks.issuperset(children)
    }
    outer = _outermost(lists)
    if not outer:
        raise UserError(
            f"no block of {type(model).__name__} takes and gives tokens (batch, tokens, width):"
            " none of its modules that do runs more than once or stands in a list; say which module"
            " is the block with loop=PATH"
        )
    if len(outer) > 1:
        listed = ", ".join(f"{path} ({len(lists[path])} blocks)" for path in outer[:6])
        raise UserError(
            f"more than one list holds blocks: {listed}; say which holds the steps with loop=PATH,"
            " or put what belongs to a step into one module"
        )
    return lists[outer[0]]


def _is_block(run: Ran) -> bool:
    """Whether a module that ran may be a step: it keeps tokens, and is more than one layer."""
    has_parts = any(True for _ in run.module.children())
    is_layer = type(run.module).__module__.partition(".")[0] in _LAYERS
    return run.keeps_tokens and (has_parts or not is_layer)


def _is_list(module: nn.Module) -> bool:
    """Whether a module is a list or Sequential without a forward of its own."""
    return isinstance(module, _LISTS) and type(module).forward in {each.forward for each in _LISTS}


def _one_kind(module: nn.Module) -> bool:
    return len({type(child) for child in module.children()}) == 1


def _children(model: nn.Module, path: str) -> list[str]:
    names = (name for name, _ in model.get_submodule(path).named_children())
    return [f"{path}.{name}" for name in names]


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths, each once, that are not inside another one."""
    listed = list(dict.fromkeys(paths))
    return [path for path in listed if not any(path.startswith(f"{other}.") for other in listed)]
