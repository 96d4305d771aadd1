"""A forward pass one step at a time: read a state, drop images, go on from there.

What needs more than a hook: images that leave after their own step, and runs that start again from
a kept state. Steps are those of the tied unroll, called as its forward calls them, so the last
state is the model's bit for bit and hooks fire as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.models.memory import Carry, MemoryBlock


@dataclass(frozen=True)
class State:
    """Where a run stands after a step: all that the steps to come depend on.

    Attributes
    ----------
    tokens : z_t ``(B, N, D)``.
    step : t; 0 for the embedded tokens.
    memory : m_t ``(B, N, D)`` of a model with a memory, from its first step on.
    """

    tokens: Tensor
    step: int = 0
    memory: Tensor | None = None

    def __getitem__(self, images: Tensor | slice) -> State:
        """The same of some images of the batch: a slice, a mask or indices ``(B',)``."""
        return State(
            self.tokens[images], self.step, None if self.memory is None else self.memory[images]
        )

    def repeated(self, times: int) -> State:
        """The whole batch `times` over, one copy behind the other: ``(times B, N, D)``."""
        memory = None if self.memory is None else self.memory.repeat(times, 1, 1)
        return State(self.tokens.repeat(times, 1, 1), self.step, memory)


def embed(model: VisionTransformer, images: Tensor) -> State:
    """Step 0: the tokens z_0 of normalised images ``(B, C, H, W)`` (eq. 1)."""
    return State(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))))


def advance(unrolled: VisionTransformer, state: State) -> State:
    """The state one step on; `unrolled` is a tied unroll or a stacked ViT."""
    block = unrolled.blocks[state.step]
    if not isinstance(block, MemoryBlock):
        return State(block(state.tokens), state.step + 1)
    before, after = Carry(), Carry()
    before.value = state.memory
    refresh = block.memory.refreshed(state.step)
    tokens = block(state.tokens, before=before, after=after, refresh=refresh)
    return State(tokens, state.step + 1, after.value)


def proceed(unrolled: VisionTransformer, state: State, until: int | None = None) -> State:
    """The state after step `until`; by default the unroll's last."""
    for _ in range(state.step, len(unrolled.blocks) if until is None else until):
        state = advance(unrolled, state)
    return state


def states(
    unrolled: VisionTransformer, images: Tensor, until: int | None = None
) -> Iterator[State]:
    """The states after steps 0, 1, ..., `until`; by default up to the unroll's last.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    images : ``(B, C, H, W)``, normalised.
    """
    state = embed(unrolled, images)
    yield state
    for _ in range(len(unrolled.blocks) if until is None else until):
        state = advance(unrolled, state)
        yield state


def answer(model: VisionTransformer, state: State) -> Tensor:
    """Logits ``(B, classes)`` of the model's own norm and head after this step (eq. 5 at every
    t)."""
    return model.forward_head(model.norm(state.tokens))
