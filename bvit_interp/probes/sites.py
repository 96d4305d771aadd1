"""Where each site is in timm's `Block` and `Attention`.

A `Step` turns a site into an ordinary forward hook on that step's modules, for recording and for
editing. Attention is computed from the step's own q and k beside the fused kernel (Vaswani et al.,
2017, eq. 1), for the query rows asked for only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.steps import TimedBlock
from bvit_interp.vocabulary import SITES

Change = Callable[[Tensor], Tensor | None]
"""Sees an activation of a whole site; returns its replacement or None."""
Handle = torch.utils.hooks.RemovableHandle


_KINDS = (Block, TimedBlock, MemoryBlock)


Heads = Float[Tensor, "batch tokens heads head_width"]
Pattern = Float[Tensor, "batch heads queries keys"]


class Step:
    """The block of one step or of one inner update, with the hooks for each site.

    Attributes
    ----------
    inner : the inner updates of the step's memory, if it has any; without inner updates of their
        own.
    edited : scores and pattern that stand in for the kernel's in the forward that is running.

    Raises
    ------
    UserError
        For a block that is not timm's plain pre-norm `Block` around its plain `Attention`: another
        order of norms or layout of heads would be recorded under the wrong names.
    """

    def __init__(self, block: nn.Module) -> None:
        for module, kinds in ((block, _KINDS), (getattr(block, "attn", None), (Attention,))):
            if type(module) not in kinds:
                raise UserError(
                    f"{type(module).__name__} cannot be probed: only timm's Block with its"
                    " Attention can"
                )
        self.block = block
        self.attn: Any = block.attn
        self.mlp: Any = block.mlp
        self.inner = (
            [Step(update) for update in block.inner] if isinstance(block, MemoryBlock) else []
        )
        self.edited: dict[str, Tensor] = {}

    @property
    def heads(self) -> int:
        """Number of heads."""
        return int(self.attn.num_heads)

    @property
    def neurons(self) -> int:
        """Number of neurons: what the FFN's out-projection reads."""
        return int(self.mlp.fc2.in_features)

    def qkv(self, fused: Float[Tensor, "batch tokens three_widths"]) -> tuple[Heads, Heads, Heads]:
        """q, k and v as attention uses them, from the output of `attn.qkv`."""
        q, k, v = fused.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.attn.q_norm(q), self.attn.k_norm(k), v

    def scores(self, fused: Float[Tensor, "batch tokens three_widths"], rows: slice) -> Pattern:
        """Scaled scores of the query tokens `rows`."""
        q, k, _ = self.qkv(fused)
        q = q[:, rows] * self.attn.scale
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)

    def attention(
        self, fused: Float[Tensor, "batch tokens three_widths"], site: str, rows: slice
    ) -> Pattern:
        """The scores or the pattern of the query tokens `rows`, as edited."""
        if site in self.edited:
            return self.edited[site][:, :, rows]
        scores = self.scores(fused, rows)
        return scores if site == "scores" else scores.softmax(-1)

    def on_input(self, part: str, change: Change) -> Handle:
        """Call `change` with the input of a module of the block, before it runs."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            new = change(args[0])
            return None if new is None else (new, *args[1:])

        return self.block.get_submodule(part).register_forward_pre_hook(hook)

    def on_output(self, part: str, change: Change) -> Handle:
        """Call `change` with the output of a module of the block."""

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return change(output)

        return self.block.get_submodule(part).register_forward_hook(hook)

    def require(self, site: str) -> None:
        """Refuse a site that this block does not have."""
        if site == "mlp_pre" and self.mlp.fc1.out_features != self.neurons:
            raise UserError(
                "a gated FFN has no mlp_pre: its neurons have two inputs each; use mlp_post"
            )


_INPUTS = {"resid_pre": "", "resid_mid": "norm2", "mlp_post": "mlp.fc2"}
_OUTPUTS = {
    "attn_out": "drop_path1",
    "mlp_pre": "mlp.fc1",
    "mlp_out": "drop_path2",
    "resid_post": "",
}
_QKV = ("q", "k", "v")


def record(step: Step, site: str, rows: slice, keep: Callable[[Tensor], None]) -> Handle:
    """Hook that hands the site's tokens `rows` (for scores and pattern: query rows) to `keep`."""
    step.require(site)
    if site in _INPUTS:
        return step.on_input(_INPUTS[site], lambda x: keep(x[:, rows]))
    if site in _OUTPUTS:
        return step.on_output(_OUTPUTS[site], lambda x: keep(x[:, rows]))
    if site in _QKV:
        return step.on_output("attn.qkv", lambda x: keep(step.qkv(x)[_QKV.index(site)][:, rows]))
    if site == "z":
        return step.on_input(
            "attn.proj", lambda x: keep(x[:, rows].unflatten(-1, (step.heads, -1)))
        )
    return step.on_output("attn.qkv", lambda x: keep(step.attention(x, site, rows)))


def edit(step: Step, changes: Mapping[str, Sequence[Change]]) -> list[Handle]:
    """Hooks for all edits of a step, by site.

    They are set in the order in which the block computes its sites, whatever the order they were
    listed in, so that each sees what the earlier ones left; several edits of one site follow each
    other as listed.
    """
    handles: list[Handle] = []
    for site in SITES:
        if site not in changes:
            continue
        step.require(site)
        if site in ("scores", "pattern"):
            if site == "scores" or "scores" not in changes:
                handles += _edit_attention(
                    step, changes.get("scores", ()), changes.get("pattern", ())
                )
            continue
        for change in changes[site]:
            handles += _edit(step, site, change)
    return handles


def _edit(step: Step, site: str, change: Change) -> list[Handle]:
    if site == "resid_mid":
        return _edit_resid_mid(step, change)
    if site in _INPUTS:
        return [step.on_input(_INPUTS[site], change)]
    if site in _OUTPUTS:
        return [step.on_output(_OUTPUTS[site], change)]
    if site in _QKV:
        return [
            step.on_output("attn.qkv", lambda x: _change_qkv(step, x, _QKV.index(site), change))
        ]
    return [step.on_input("attn.proj", lambda x: _flat(change(x.unflatten(-1, (step.heads, -1)))))]


def _flat(z: Tensor | None) -> Tensor | None:
    return None if z is None else z.flatten(-2)


def _change_qkv(step: Step, fused: Tensor, which: int, change: Change) -> Tensor | None:
    if which < 2 and not isinstance(step.attn.q_norm, nn.Identity):
        raise UserError("q and k cannot be edited behind a q/k norm; edit scores or pattern")
    parts = list(fused.unflatten(-1, (3, step.heads, -1)).unbind(2))
    new = change(parts[which])
    if new is None:
        return None
    parts[which] = new
    return torch.stack(parts, dim=2).flatten(2)


def _edit_resid_mid(step: Step, change: Change) -> list[Handle]:
    """The residual also skips the FFN: the change is carried to the step's output by the same
    amount."""
    carried: list[Tensor] = []

    def before_norm(x: Tensor) -> Tensor | None:
        carried.clear()
        new = change(x)
        if new is not None:
            carried.append(new - x)
        return new

    return [
        step.on_input("norm2", before_norm),
        step.on_output("", lambda x: x + carried.pop() if carried else None),
    ]


def _edit_attention(
    step: Step, of_scores: Sequence[Change], of_pattern: Sequence[Change]
) -> list[Handle]:
    """The kernel's result is replaced, before the projection, by the edited pattern applied to
    v."""
    attn = step.block.attn
    if not isinstance(attn.norm, nn.Identity) or getattr(attn, "gate", None) is not None:
        raise UserError(
            "scores and pattern cannot be edited where attention is normed or gated before its"
            " projection"
        )
    replaced: list[Tensor] = []

    def after_qkv(fused: Tensor) -> None:
        replaced.clear()
        step.edited = {}
        plain = step.scores(fused, slice(None))
        scores = _changed(plain, of_scores)
        unedited = scores.softmax(-1)
        pattern = _changed(unedited, of_pattern)
        if scores is plain and pattern is unedited:
            return
        step.edited = {"scores": scores, "pattern": pattern}
        values = step.qkv(fused)[2].transpose(1, 2)
        replaced.append((pattern @ values).transpose(1, 2).flatten(2))

    return [
        step.on_output("attn.qkv", after_qkv),
        step.on_input("attn.proj", lambda _: replaced.pop() if replaced else None),
    ]


def _changed(x: Tensor, changes: Sequence[Change]) -> Tensor:
    """`x` after every change in turn."""
    for change in changes:
        new = change(x)
        x = x if new is None else new
    return x
