"""Finds the argument of a block that is the token state.

A block may read other tensors of the same rank beside its tokens: an input that is injected at
every step, tokens to attend to, an earlier state. The token state has the shape of the block's
output. If several arguments have this shape, the block map may name the token state. Otherwise it
is the argument that a call returns and the next call reads, or else the only one that is not the
same in every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bvit_interp.errors import UserError, choices
from bvit_interp.models.dry_run import Argument, Ran
from bvit_interp.models.families import map_of
from bvit_interp.models.nested import Path


def find_tokens(calls: Sequence[Ran]) -> list[Path | None]:
    """Path to the tokens in ``[args, kwargs]`` of each call; None for `first_tensor`.

    Parameters
    ----------
    calls : the runs of the blocks in a dry run, in order.

    Raises
    ------
    UserError
        If several arguments may be the token state and nothing tells which, or if the block map
        names an argument of another shape.
    """
    by_kind: dict[type[nn.Module], list[int]] = {}
    for i, call in enumerate(calls):
        by_kind.setdefault(type(call.module), []).append(i)
    found: list[Path | None] = [None] * len(calls)
    for places in by_kind.values():
        read = {i: _by_name(calls[i]) for i in places}
        told = map_of(calls[places[0]].module).tokens
        if told is None and any(len(arguments) > 1 for arguments in read.values()):
            told = _evident(calls, read)
        for i, arguments in read.items():
            if told is not None and arguments and told not in arguments:
                raise UserError(
                    f"{calls[i].path}: its block map says that {told!r} is the token state; the"
                    f" arguments of the shape of its output: {choices(arguments)}"
                )
            if arguments:
                found[i] = arguments[next(iter(arguments)) if told is None else told].path
    return found


def _by_name(call: Ran) -> dict[str, Argument]:
    """The possible arguments, by their names in the signature of the block's forward."""
    names = list(inspect.signature(call.module.forward).parameters)

    def name(argument: Argument) -> str:
        by_keyword, key, *rest = argument.path
        own = key if by_keyword or key >= len(names) else names[key]
        return f"{own}{''.join(f'[{each!r}]' for each in rest)}"

    return {name(argument): argument for argument in call.arguments}


def _evident(calls: Sequence[Ran], read: Mapping[int, Mapping[str, Argument]]) -> str:
    """The name of the argument that its values in the calls show to be the token state."""
    first, *others = read
    names = [name for name in read[first] if all(name in read[i] for i in others)]
    later = [i for i in read if i]
    carried = [
        name
        for name in names
        if later and all(_same(read[i][name].value, calls[i - 1].output) for i in later)
    ]
    changing = [
        name
        for name in names
        if not all(_same(read[i][name].value, read[first][name].value) for i in others)
    ]
    for found in (carried, changing):
        if len(found) == 1:
            return found[0]
    kind = type(calls[first].module).__name__
    most = max(read.values(), key=lambda arguments: len(arguments))
    raise UserError(
        f"{calls[first].path} reads several tensors of the shape of its output"
        f" ({choices(most)}), and it is not clear which is the token state:"
        f" name the argument with register_block({kind}, {{}}, tokens=NAME)"
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and not one.is_meta and torch.equal(one, other)
