"""The memory of bViT-fl (fast latent) and bViT-sc (skip memory).

They are described in appendix D of bViT (arXiv 2605.10661). Our copy of the paper lacks its
equations, so they are reconstructed from its text, parameters and FLOPs (Table 6). With a memory
m_t that starts at zero, a step is

    m_t from m_{t-1} and z_{t-1};   z_t = F(z_{t-1} + m_t + e_t)

    latent  (fl)  m_t is m_{t-1} after n inner updates  m <- F(m + z_{t-1} + e_t)
    block   (sc)  m_t = F(m_{t-1} + z_{t-1}) every k-th step, from the first, else m_{t-1}
    state   (sc)  m_t = z_{t-1} every k-th step, from the first, else m_{t-1}: no FLOPs

Where the paper does not say, these are our choices: F is also the update block (8.6 M parameters);
n = 3 (134.1 GFLOPs); "state" for sc (its 33.7 GFLOPs leave no room for an update); k = 4; no e_t
unless `step_embed` asks for it (the paper: "optional"); and the gradients that "truncated" and
"frozen" stop. Inner updates are as in TRM (Jolicoeur-Martineau, 2025,
https://arxiv.org/abs/2510.04871).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bvit_interp.models.steps import Steps, TimedBlock

Kind = Literal["latent", "state", "block"]
Gradient = Literal["full", "truncated", "frozen"]


@dataclass(frozen=True)
class Memory:
    """What a model remembers beside its state; arguments that are None take their default.

    Raises
    ------
    ValueError
        For an unknown word, a number below 1, or an argument that this kind of memory does not
        have.
    """

    kind: Kind
    inner_updates: int | None = None
    """For latent: number n of inner updates per step, >= 1; default 3."""
    interval: int | None = None
    """For state and block: number k of steps from one refresh to the next, >= 1; default 4."""
    gradient: Gradient | None = None
    """Where gradients flow. full (default): everywhere. truncated: not through the memory that
    enters a step. frozen: not through the memory that is added to the state."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"memory must be one of {', '.join(get_args(Kind))}, got {self.kind!r}"
            )
        own, other, default = "inner_updates", "interval", 3
        if self.kind != "latent":
            own, other, default = other, own, 4
        if getattr(self, other) is not None:
            raise ValueError(f"memory={self.kind!r} has {own}, not {other}")
        for name, value in ((own, default), ("gradient", "full")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if getattr(self, own) < 1:
            raise ValueError(f"{own} must be >= 1, got {getattr(self, own)}")
        if self.gradient not in get_args(Gradient):
            raise ValueError(
                f"memory_gradient must be one of {', '.join(get_args(Gradient))}, got"
                f" {self.gradient!r}"
            )

    @property
    def calls(self) -> int:
        """How often a refresh calls the block."""
        return {"latent": self.inner_updates or 0, "block": 1, "state": 0}[self.kind]

    def refreshed(self, i: int) -> bool:
        """Whether application i (from 0) changes the memory."""
        return self.interval is None or i % self.interval == 0

    def updates(self, i: int) -> int:
        """How often application i (from 0) calls the block for the memory."""
        return self.calls if self.refreshed(i) else 0


class Carry:
    """The memory that one step of a run leaves to the next. Each step has its own, so a step that
    is computed again under gradient checkpointing reads the same memory."""

    def __init__(self) -> None:
        self.value: Tensor | None = None


class MemoryBlock(TimedBlock):
    """The block F of a model with a memory; its forward is one whole step.

    Parameters
    ----------
    memory : kind and options of the memory.
    *args, **kwargs : as in timm's `Block`.

    Attributes
    ----------
    inner : in a tied unroll, one ordinary block per inner update; empty in the recurrent model,
        whose block calls itself.
    """

    def __init__(self, *args: Any, memory: Memory, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = memory
        # not a module yet, so that a recurrent block has the keys and children of timm's block
        self.inner: Any = ()

    def own_updates(self, blocks: list[nn.Module]) -> None:
        """Call these blocks for the inner updates from now on, as a step of an unroll."""
        self.inner = nn.ModuleList(blocks)
        self.inner.training = self.training

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        step_embed: Float[Tensor, " width"] | None = None,
        before: Carry | None = None,
        after: Carry | None = None,
        refresh: bool = True,
    ) -> Float[Tensor, "batch tokens width"]:
        """z_t ``(B, N, D)`` of z_{t-1}; reads the memory of the step before and leaves its own in
        `after`."""
        if before is None or after is None:
            raise ValueError(
                "a step with a memory needs that of the step before: call the model, or its"
                " blocks in turn"
            )
        masks: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal}
        row = self.row(step_embed)
        memory = torch.zeros_like(x) if before.value is None else before.value
        if self.memory.gradient == "truncated":
            memory = memory.detach()
        if refresh and self.memory.kind == "state":
            memory = x
        elif refresh:
            timed = row if self.memory.kind == "latent" else None
            for update in self.inner or [partial(Block.forward, self)] * self.memory.calls:
                read = memory + x
                memory = update(read if timed is None else read + timed, **masks)
        after.value = memory
        read = x + (memory.detach() if self.memory.gradient == "frozen" else memory)
        return Block.forward(self, read if row is None else read + row, **masks)


class MemorySteps(Steps):
    """`Steps` of `MemoryBlock`s. Each iteration over them is a run with its own memory."""

    def __iter__(self) -> Iterator[Any]:
        return _linked(super().__iter__(), self[0].memory)


class UnrolledSteps(nn.Sequential):
    """The steps of an unroll with a memory. Iteration gives the modules; `run` gives the calls of
    one run."""

    def run(self) -> Iterator[Any]:
        """The calls of one run; each gets the memory of the one before."""
        first: Any = self[0]
        return _linked(self, first.memory)

    def forward(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """z_T of z_0, ``(B, N, D)``."""
        for step in self.run():
            x = step(x)
        return x


def calls_of(blocks: nn.Sequential) -> Iterable[Any]:
    """What a forward pass calls, in order: the calls of a new run for any kind of blocks."""
    return blocks.run() if isinstance(blocks, UnrolledSteps) else blocks


def _linked(calls: Iterable[Any], memory: Memory) -> Iterator[Any]:
    before = Carry()
    for i, call in enumerate(calls):
        after = Carry()
        yield partial(call, before=before, after=after, refresh=memory.refreshed(i))
        before = after


def as_plain(block: Block) -> Block:
    """An ordinary timm `Block` made of the modules of `block`: an inner update of an unroll."""
    plain = Block.__new__(Block)  # its __init__ would draw weights
    nn.Module.__init__(plain)
    for name, module in block.named_children():
        plain.add_module(name, module)
    plain.training = block.training
    return plain
