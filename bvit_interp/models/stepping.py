"""A forward pass one step at a time: read, drop images, continue.

For what needs more than a hook: images that leave after a step of their own, and runs that start
again from a stored state. The steps are those of the tied unroll, called as its forward calls them,
so the last state is bit-equal to the model's, and hooks fire as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bvit_interp.models.memory import Carry, MemoryBlock


@dataclass(frozen=True)
class State:
    """The state of a run after a step: everything that the later steps depend on.

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
        """The state of some images of the batch: a slice, a mask or indices ``(B',)``."""
        return State(
            self.tokens[images], self.step, None if self.memory is None else self.memory[images]
        )

    def repeated(self, times: int) -> State:
        """The whole batch `times` over, one copy after the other: ``(times B, N, D)``."""
        memory = None if self.memory is None else self.memory.repeat(times, 1, 1)
        return State(self.tokens.repeat(times, 1, 1), self.step, memory)


def embed(model: VisionTransformer, images: Float[Tensor, "batch channels height width"]) -> State:
    """Step 0: the tokens z_0 of normalised images (eq. 1)."""
    return State(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))))


def advance(unrolled: VisionTransformer, state: State) -> State:
    """The state after one more step; `unrolled` is a tied unroll or a stacked ViT."""
    block = unrolled.blocks[state.step]
    if not isinstance(block, MemoryBlock):
        return State(block(state.tokens), state.step + 1)
    before, after = Carry(), Carry()
    before.value = state.memory
    refresh = block.memory.refreshed(state.step)
    tokens = block(state.tokens, before=before, after=after, refresh=refresh)
    return State(tokens, state.step + 1, after.value)


def proceed(unrolled: VisionTransformer, state: State, until: int | None = None) -> State:
    """The state after step `until`; by default the unroll's last step."""
    for _ in range(state.step, len(unrolled.blocks) if until is None else until):
        state = advance(unrolled, state)
    return state


def states(
    unrolled: VisionTransformer,
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
    for _ in range(len(unrolled.blocks) if until is None else until):
        state = advance(unrolled, state)
        yield state


def answer(model: VisionTransformer, state: State) -> Float[Tensor, "batch classes"]:
    """Logits of the model's own norm and head after this step (eq. 5 at every t)."""
    return model.forward_head(model.norm(state.tokens))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights, where statistics over its activations are best kept."""
    return next(model.parameters()).device
