"""Steps: blocks that are stored once and applied again and again.

They are the container of every `BViT`: eq. 6 of the paper (arXiv 2605.10661), or eq. 9 with a time
embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

Order = Literal["cycle", "repeat"]


class TimedBlock(Block):
    """A block that adds the time embedding of its step: ``z_t = F(z_{t-1}) + e_t`` (eq. 9).

    In the recurrent model the row e_t comes with the call; a clone in the tied unroll owns its step
    and looks the row up itself.
    """

    step_embed: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter("step_embed", None)
        self.step_index = 0

    def own_step(self, step_embed: nn.Parameter, index: int) -> None:
        """Use row `index` of `step_embed` from now on, as a step of an unroll."""
        self.register_parameter("step_embed", step_embed)
        self.step_index = index

    def row(self, given: Float[Tensor, " width"] | None) -> Float[Tensor, " width"] | None:
        """e_t ``(D,)``: the given one, or this step's own; None if there is neither."""
        if given is None and self.step_embed is not None:
            return self.step_embed[self.step_index]
        return given

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        step_embed: Float[Tensor, " width"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        row = self.row(step_embed)
        if row is None:
            raise ValueError("a TimedBlock outside an unroll needs step_embed")
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal) + row


class Steps(nn.Sequential):
    """`length` applications of the stored blocks, in order.

    The blocks are stored (and saved) once; `len`, iteration and indexing go by application, which
    is what timm's `forward_intermediates`, `features_only` and `prune_intermediate_layers` count.

    Parameters
    ----------
    blocks : the distinct blocks.
    length : number of applications.
    order : "cycle" applies B1 B2 B1 B2 ...; "repeat" applies B1 `rounds` times, then B2, ...
    rounds : applications of each block under "repeat".
    step_embed : one learned vector per step, ``(length, dim)``, or None.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        length: int,
        order: Order = "cycle",
        rounds: int = 1,
        step_embed: nn.Parameter | None = None,
    ) -> None:
        super().__init__(*blocks)
        self.length, self.order, self.rounds = length, order, rounds
        self.step_embed = step_embed

    def block_index(self, i: int) -> int:
        """Which stored block the i-th application (from 0) uses; also beyond `length`."""
        stored = len(self._modules)
        return i % stored if self.order == "cycle" else min(i // self.rounds, stored - 1)

    def embed_index(self, i: int) -> int:
        """Row of `step_embed` used at application i (from 0); beyond the last row, the last row."""
        return i if self.step_embed is None else min(i, len(self.step_embed) - 1)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        stored = list(self._modules.values())
        for i in range(self.length):
            block = stored[self.block_index(i)]
            if self.step_embed is None:
                yield block
            else:
                yield partial(block, step_embed=self.step_embed[self.embed_index(i)])

    def __getitem__(self, index: int | slice) -> Any:
        stored = list(self._modules.values())
        if isinstance(index, int):
            return stored[self.block_index(range(self.length)[index])]
        kept = range(self.length)[index]
        if kept != range(len(kept)):
            raise IndexError(f"steps can only be cut at the end (blocks[:n]), got {index}")
        used = sorted({self.block_index(i) for i in kept})
        return type(self)(
            [stored[i] for i in used], len(kept), self.order, self.rounds, self.step_embed
        )
