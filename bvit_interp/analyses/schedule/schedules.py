"""Schedules: the order in which the steps of an unroll are applied.

Each step keeps what is its own: its row of the time embedding, the refresh of a memory, its block
in a hybrid or a stack. Steps that are the same function are recognised, and schedules that begin
alike share those steps. A loop of another model's own has its order in a forward that is not ours:
there, schedules can end early or leave steps out, and nothing else (`can_run`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.stepping import State, advance, answer, embed
from bvit_interp.models.steps import TimedBlock
from bvit_interp.models.unroll import unroll

Schedule = tuple[int, ...]
"""Steps in the order in which they are applied, from 1."""


class Run(NamedTuple):
    """The name of a schedule."""

    variant: str
    step: int | None = None
    other_step: int | None = None


def schedules(
    trained: int, runs: Sequence[int] = (), shifts: Sequence[int] = ()
) -> dict[Run, Schedule]:
    """The schedules of a model of T trained steps; "normal" is 1..T.

    Parameters
    ----------
    trained : T.
    runs : numbers of steps S of the runs 1..S.
    shifts : numbers of steps d. `delay` applies steps d + 1..T; `lag` applies T steps, each d
        behind, with step 1 at the beginning; `lead` applies T steps, each d ahead, with step T at
        the end. Shifts of T and more are left out.
    """
    whole = tuple(range(1, trained + 1))
    named = {Run("normal"): whole, Run("reverse"): whole[::-1], Run("twice"): 2 * whole}
    for t in whole:
        named[Run("skip", t)] = whole[: t - 1] + whole[t:]
        named[Run("repeat", t)] = whole[:t] + whole[t - 1 :]
        named[Run("fixed", t)] = (t,) * trained
    for t in whole[:-1]:
        named[Run("swap", t, t + 1)] = (*whole[: t - 1], t + 1, t, *whole[t + 1 :])
    for d in shifts:
        if d >= trained:
            continue
        named[Run("delay", d)] = whole[d:]
        named[Run("lag", d)] = tuple(max(t - d, 1) for t in whole)
        named[Run("lead", d)] = tuple(min(t + d, trained) for t in whole)
    return named | {Run("run", count): tuple(range(1, count + 1)) for count in runs}


def substitutions(trained: int) -> dict[Run, Schedule]:
    """Step s in place of step t, for all T x T pairs; s = t is the normal run."""
    whole = tuple(range(1, trained + 1))
    return {Run("replace", t, s): (*whole[: t - 1], s, *whole[t:]) for t in whole for s in whole}


def can_run(view: Model, schedule: Schedule) -> bool:
    """Whether an unroll can apply steps in this order.

    In a `CalledSteps` each step runs in its own place, because its model makes what the step reads:
    the order starts at step 1 and goes up. Where later steps read more than the state before them,
    none can be left out.
    """
    if max(schedule) > len(view.blocks):
        return False
    if not isinstance(view, CalledSteps):
        return True
    if view.needs_history:
        return schedule == tuple(range(1, len(schedule) + 1))
    return schedule[0] == 1 and all(a < b for a, b in itertools.pairwise(schedule))


def same_steps(view: Model) -> list[int]:
    """For every step of an unroll, the first step that is the same function, from 1.

    Two steps are the same function if they have the same tensors under the same names, the same row
    of a time embedding and the same refresh of a memory. A step with hooks is the same as no other,
    and so is each step of a `CalledSteps`, whose model may make something else for each to read.
    """
    if isinstance(view, CalledSteps):
        return list(range(1, len(view.blocks) + 1))
    first: dict[tuple[object, ...], int] = {}
    return [first.setdefault(_function(block, i), i + 1) for i, block in enumerate(view.blocks)]


def _function(block: Any, i: int) -> tuple[object, ...]:
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
        return (id(block),)
    tensors = [
        *block.named_parameters(remove_duplicate=False),
        *block.named_buffers(remove_duplicate=False),
    ]
    row = block.step_index if getattr(block, "step_embed", None) is not None else None
    refresh = block.memory.refreshed(i) if isinstance(block, MemoryBlock) else None
    return (*((name, id(tensor)) for name, tensor in tensors), row, refresh)


def time_embedding(view: Model) -> Tensor | None:
    """The rows that the steps of a `BViT` add, ``(T, D)``, or None."""
    block = view.blocks[0]
    return block.step_embed if isinstance(block, TimedBlock) else None


def with_mean_embedding(model: Model) -> Model | None:
    """An unroll whose every step adds the mean row of the time embedding; None if there is none."""
    view = unroll(model)
    table = time_embedding(view)
    if table is None:
        return None
    mean = nn.Parameter(table.detach().mean(0, keepdim=True), requires_grad=False)
    blocks: Any = view.blocks
    for block in blocks:
        block.own_step(mean, 0)
    return view


@dataclass
class _Node:
    """A state that schedules reach: the schedules that end there, and the steps that follow."""

    ends: list[int] = field(default_factory=list)
    after: dict[int, _Node] = field(default_factory=dict)


class Plan:
    """Schedules of one unroll, run together.

    Parameters
    ----------
    view : a tied unroll with every step that is named.
    schedules : name -> steps.

    Attributes
    ----------
    runs : the names, in order.
    applied : number of steps that are computed for all of them together.

    Raises
    ------
    UserError
        For a schedule that the unroll cannot run.
    """

    def __init__(self, view: Model, schedules: Mapping[Run, Schedule]) -> None:
        self.view, self.runs, self.applied = view, tuple(schedules), 0
        self._root = _Node()
        first = same_steps(view)
        for i, (run, steps) in enumerate(schedules.items()):
            if not can_run(view, steps):
                why = "a step of a loop that is not ours runs in its own place alone"
                if max(steps) > len(view.blocks):
                    why = f"it has {len(view.blocks)} steps"
                raise UserError(f"{run.variant}: the model cannot apply steps {steps}: {why}")
            node = self._root
            for step in steps:
                same = first[step - 1]
                if same not in node.after:
                    node.after[same] = _Node()
                    self.applied += 1
                node = node.after[same]
            node.ends.append(i)

    def logits(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "runs batch classes"]:
        """Logits after every schedule; at any time only the states on one path are kept."""
        logits: dict[int, Tensor] = {}
        waiting: list[tuple[_Node, State, int | None]] = [
            (self._root, embed(self.view, images), None)
        ]
        while waiting:
            node, state, step = waiting.pop()
            if step is not None:
                state = advance(self.view, replace(state, step=step - 1))
            if node.ends:
                logits |= dict.fromkeys(node.ends, answer(self.view, state))
            waiting += [(child, state, step) for step, child in node.after.items()]
        return torch.stack([logits[i] for i in range(len(self.runs))])
