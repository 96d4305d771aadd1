"""Runs a forward step by step: read the state, drop images, continue.

This is for what needs more than a hook: images that leave after different steps, and runs that
start from a stored state. The steps are those of the tied unroll, called as its forward calls them,
so the last state is bit-equal to the model's, and hooks fire as usual. In a `CalledSteps` the
model's own forward runs again around the steps that are asked for, so everything outside
the blocks is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bvit_interp.models.looped import CalledSteps
from bvit_interp.models.memory import Carry, MemoryBlock
from bvit_interp.models.nested import first_tensor, map_tensors, with_first


@dataclass(frozen=True)
class State:
    """The state of a run after a step: everything that the later steps depend on.

    Attributes
    ----------
    tokens : z_t ``(B, N, D)``.
    step : t; 0 for the embedded tokens.
    memory : m_t ``(B, N, D)`` of a model with a memory, from its first step on.
    images, outputs : for a `CalledSteps`, the images, and what each of its calls so far returned.
    """

    tokens: Tensor
    step: int = 0
    memory: Tensor | None = None
    images: Tensor | None = None
    outputs: tuple[Any, ...] = ()

    def __getitem__(self, images: Tensor | slice) -> State:
        """The state of some images of the batch: a slice, a mask or indices ``(B',)``."""
        return self._changed(lambda tensor: tensor[images])

    def repeated(self, times: int) -> State:
        """The batch repeated `times` times, one copy after the other: ``(times B, N, D)``."""
        return self._changed(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def _changed(self, change: Any) -> State:
        """The state with every tensor changed whose first axis is the batch."""
        batch = len(self.tokens)

        def of_batch(tensor: Tensor) -> Tensor:
            return change(tensor) if tensor.ndim and len(tensor) == batch else tensor

        parts = (self.tokens, self.memory, self.images, self.outputs)
        tokens, memory, images, outputs = map_tensors(parts, of_batch)
        return State(tokens, self.step, memory, images, outputs)


def embed(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> State:
    """Step 0: the tokens z_0 of normalised images (eq. 1), or what enters the first call."""
    if isinstance(model, CalledSteps):
        return State(model.embed(images), images=images)
    vit: Any = model
    return State(vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))))


def advance(unrolled: nn.Module, state: State) -> State:
    """The state after one more step; `unrolled` is a tied unroll or a stacked ViT."""
    if isinstance(unrolled, CalledSteps):
        return proceed(unrolled, state, state.step + 1)
    block: Any = unrolled.blocks[state.step]  # type: ignore[index]
    if not isinstance(block, MemoryBlock):
        return State(block(state.tokens), state.step + 1)
    before, after = Carry(), Carry()
    before.value = state.memory
    refresh = block.memory.refreshed(state.step)
    tokens = block(state.tokens, before=before, after=after, refresh=refresh)
    return State(tokens, state.step + 1, after.value)


def proceed(unrolled: nn.Module, state: State, until: int | None = None) -> State:
    """The state after step `until`; by default the unroll's last step."""
    until = num_steps(unrolled) if until is None else until
    if isinstance(unrolled, CalledSteps):
        return state if until == state.step else _call_on(unrolled, state, until)
    for _ in range(state.step, until):
        state = advance(unrolled, state)
    return state


def states(
    unrolled: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    until: int | None = None,
) -> Iterator[State]:
    """The states after steps 0, 1, ..., `until`; by default up to the unroll's last step.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : normalised.
    """
    state = embed(unrolled, images)
    yield state
    for _ in range(num_steps(unrolled) if until is None else until):
        state = advance(unrolled, state)
        yield state


def answer(model: nn.Module, state: State) -> Float[Tensor, "batch classes"]:
    """Logits of the model's own norm and head after this step (eq. 5 at every t).

    For a `CalledSteps`: the output of its forward with this state in place of the last call's
    output.
    """
    if isinstance(model, CalledSteps):
        return model.read(_images_of(state), _calls_of(state), state.tokens)
    vit: Any = model
    return vit.forward_head(vit.norm(state.tokens))


def num_steps(unrolled: nn.Module) -> int:
    """T, the steps of a tied unroll or of a stacked ViT."""
    blocks: Any = unrolled.blocks
    return len(blocks)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights; statistics of its activations are best kept there."""
    return next(model.parameters()).device


def _call_on(view: CalledSteps, state: State, until: int) -> State:
    """The state after step `until`, by the model's own forward."""
    entry = state.tokens if state.step == 0 else None
    run = view.resume(_images_of(state), _calls_of(state), entry=entry, stop=until)
    tokens = first_tensor(run.outputs[-1])
    assert tokens is not None  # a block gives tokens
    return replace(state, tokens=tokens, step=until, outputs=tuple(run.outputs))


def _calls_of(state: State) -> list[Any]:
    """What each call so far returned, the last one with the tokens of the state. Calls that a
    schedule has skipped return the same as the last."""
    if state.step == 0:
        return []
    *earlier, last = state.outputs[: state.step]
    last = with_first(last, state.tokens)
    return [*earlier, *[last] * (state.step - len(earlier))]


def _images_of(state: State) -> Tensor:
    if state.images is None:
        raise ValueError("the state of a CalledSteps comes from embed, which keeps the images")
    return state.images
