"""Where each site is in a block: the one place that knows timm's `Block` and `Attention`.

A `Tap` turns a site of one step into an ordinary forward hook on that step's modules. Recording and editing
share the taps, so what is recorded is what can be edited. Attention is computed from the step's own q and k
beside the fused kernel (Vaswani et al., 2017, eq. 1), for the query rows asked for only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bvit_interp.errors import UserError

Change = Callable[[Tensor], Tensor | None]
"""Sees an activation of a whole site; returns its replacement or None."""
_PARTS = ("norm1", "attn.qkv", "attn.proj", "drop_path1", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2", "drop_path2")


def check_block(block: nn.Module) -> nn.Module:
    """`block` itself, or a UserError if it lacks the parts the sites are defined by."""
    for part in _PARTS:
        try:
            block.get_submodule(part)
        except AttributeError:
            raise UserError(f"{type(block).__name__} has no {part}: only timm's pre-norm Block can be probed") from None
    return block


@dataclass(frozen=True)
class Step:
    """The block of one step, with the hooks for each site."""

    block: nn.Module

    @property
    def heads(self) -> int:
        return int(self.block.attn.num_heads)

    def qkv(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``(B, N, H, E)`` as attention uses them, from the output of `attn.qkv` ``(B, N, 3 H E)``."""
        q, k, v = fused.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.block.attn.q_norm(q), self.block.attn.k_norm(k), v

    def scores(self, fused: Tensor, rows: slice) -> Tensor:
        """Scaled scores ``(B, H, Q, K)`` of the query tokens `rows`."""
        q, k, _ = self.qkv(fused)
        q = q[:, rows] * self.block.attn.scale
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)

    def on_input(self, part: str, change: Change) -> torch.utils.hooks.RemovableHandle:
        """Call `change` with the input of a module of the block, before it runs."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            new = change(args[0])
            return None if new is None else (new, *args[1:])

        return self.block.get_submodule(part).register_forward_pre_hook(hook)

    def on_output(self, part: str, change: Change) -> torch.utils.hooks.RemovableHandle:
        """Call `change` with the output of a module of the block."""

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return change(output)

        return self.block.get_submodule(part).register_forward_hook(hook)


_INPUTS = {"resid_pre": "", "resid_mid": "norm2"}
_OUTPUTS = {
    "attn_out": "drop_path1", "mlp_pre": "mlp.fc1", "mlp_post": "mlp.act", "mlp_out": "drop_path2", "resid_post": "",
}  # fmt: skip
_QKV = ("q", "k", "v")


def record(step: Step, site: str, rows: slice, keep: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Hook that hands the site's tokens `rows` (for scores and pattern: query rows) to `keep`."""
    if site in _INPUTS:
        return step.on_input(_INPUTS[site], lambda x: keep(x[:, rows]))
    if site in _OUTPUTS:
        return step.on_output(_OUTPUTS[site], lambda x: keep(x[:, rows]))
    if site in _QKV:
        return step.on_output("attn.qkv", lambda x: keep(step.qkv(x)[_QKV.index(site)][:, rows]))
    if site == "scores":
        return step.on_output("attn.qkv", lambda x: keep(step.scores(x, rows)))
    if site == "pattern":
        return step.on_output("attn.qkv", lambda x: keep(step.scores(x, rows).softmax(-1)))
    assert site == "z", site
    return step.on_input("attn.proj", lambda x: keep(x[:, rows].unflatten(-1, (step.heads, -1))))


def edit(step: Step, site: str, change: Change) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that replace the whole site by what `change` returns."""
    if site == "resid_mid":
        return _edit_resid_mid(step, change)
    if site in _INPUTS:
        return [step.on_input(_INPUTS[site], change)]
    if site in _OUTPUTS:
        return [step.on_output(_OUTPUTS[site], change)]
    if site in _QKV:
        return [step.on_output("attn.qkv", lambda x: _change_qkv(step, x, _QKV.index(site), change))]
    if site == "z":
        return [step.on_input("attn.proj", lambda x: _flat(change(x.unflatten(-1, (step.heads, -1)))))]
    return _edit_attention(step, site, change)


def _flat(z: Tensor | None) -> Tensor | None:
    return None if z is None else z.flatten(-2)


def _change_qkv(step: Step, fused: Tensor, which: int, change: Change) -> Tensor | None:
    if which < 2 and not isinstance(step.block.attn.q_norm, nn.Identity):
        raise UserError("q and k cannot be edited behind a q/k norm; edit scores or pattern")
    parts = list(fused.unflatten(-1, (3, step.heads, -1)).unbind(2))
    new = change(parts[which])
    if new is None:
        return None
    parts[which] = new
    return torch.stack(parts, dim=2).flatten(2)


def _edit_resid_mid(step: Step, change: Change) -> list[torch.utils.hooks.RemovableHandle]:
    """The residual also skips the FFN: the change is carried to the step's output by the same amount."""
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


def _edit_attention(step: Step, site: str, change: Change) -> list[torch.utils.hooks.RemovableHandle]:
    """The kernel's result is replaced, before the projection, by the edited pattern applied to v."""
    replaced: list[Tensor] = []
    attn = step.block.attn
    if not isinstance(attn.norm, nn.Identity) or getattr(attn, "gate", None) is not None:
        raise UserError("scores and pattern cannot be edited where attention is normed or gated before its projection")

    def after_qkv(fused: Tensor) -> None:
        replaced.clear()
        scores = step.scores(fused, slice(None))
        pattern = scores.softmax(-1)
        new = change(scores if site == "scores" else pattern)
        if new is not None:
            pattern = new.softmax(-1) if site == "scores" else new
            values = step.qkv(fused)[2].transpose(1, 2)
            replaced.append((pattern @ values).transpose(1, 2).flatten(2))

    return [
        step.on_output("attn.qkv", after_qkv),
        step.on_input("attn.proj", lambda _: replaced.pop() if replaced else None),
    ]
