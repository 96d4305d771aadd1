"""Sites of a step, for recording and for editing.

A site outside attention is the input or the output of a module of the block, which
`bvit_interp.models.families` names. It is recorded and edited by an ordinary forward hook. The
sites of attention are seen at the kernel (`bvit_interp.models.attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models import attention
from bvit_interp.models.arguments import tokens_of, with_tokens
from bvit_interp.models.attention import Change, attention_of
from bvit_interp.models.families import map_of
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.nested import first_tensor, with_first
from bvit_interp.vocabulary import SITES

FFN_MATRICES = {"fc1": "mlp_pre", "fc2": "mlp_post"}
"""Weights of an FFN -> their site: mlp_pre is the output of fc1, mlp_post the input of fc2."""
Handle = attention.Handle | torch.utils.hooks.RemovableHandle
"""Its method `remove` ends a recording or an edit."""


class Step:
    """The block of one step or of one inner update, with the hooks for each site.

    Attributes
    ----------
    inner : a `Step` for each inner update of the step's memory, if there are any. Their own `inner`
        is empty.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.inner = (
            [Step(update) for update in block.inner] if isinstance(block, MemoryBlock) else []
        )
        self._map = map_of(block)
        inner = [update.block for update in self.inner]
        self._attention = attention_of(block, self._map.combine, inner)

    def refuse_repeated(self, site: str) -> str:
        """From now on, refuse a site whose module runs more than once per step; returns why."""
        reason = (
            f"a {type(self.block).__name__} runs its {self._place(site)[0]!r} more than once per"
            " step, so its block map has to name another module"
        )
        self._map = replace(self._map, missing={**self._map.missing, site: reason})
        return reason

    def require(self, site: str) -> None:
        """Refuse a site that this block does not have.

        Raises
        ------
        UserError
            For a missing site; the message says why, and lists the sites of the block.
        """
        if site in self._map.missing:
            there = ", ".join(name for name in SITES if name not in self._map.missing)
            raise UserError(f"{site}: {self._map.missing[site]}; its sites: {there}")

    def linear_of(self, matrix: str) -> tuple[nn.Module, str]:
        """Where a weight of the FFN is: the module that holds its Linear, and the attribute.

        Parameters
        ----------
        matrix : a key of `FFN_MATRICES`.

        Raises
        ------
        UserError
            For an FFN that has no such Linear.
        """
        site = FFN_MATRICES[matrix]
        kind = type(self.block).__name__
        if site in self._map.missing:
            raise UserError(f"the FFN of {kind} has no {matrix}: {self._map.missing[site]}")
        owner, _, name = self._place(site)[0].rpartition(".")
        holder = self.block.get_submodule(owner)
        if not isinstance(getattr(holder, name), nn.Linear):
            raise UserError(f"the FFN of {kind} has no Linear {matrix}")
        return holder, name

    def record(self, site: str, rows: slice, keep: Callable[[Tensor], None]) -> Handle:
        """Hand the site's tokens `rows` (for scores and pattern: query rows) to `keep`."""
        self.require(site)
        if site in attention.SITES:
            return self._attention.record(site, rows, keep)
        return self._hook(site, lambda x: keep(x[:, rows]))

    def edit(self, changes: Mapping[str, Sequence[Change]]) -> list[Handle]:
        """Set hooks for all edits of the step, by site.

        They are set in the order in which the block computes its sites, not in the order of
        `changes`, so that each edit sees the result of the earlier ones. Several edits of one site
        run in the order in which they are listed.
        """
        handles: list[Handle] = []
        for site in SITES:
            for change in changes.get(site, ()):
                self.require(site)
                if site in attention.SITES:
                    handles.append(self._attention.edit(site, change))
                elif site == "resid_mid" and self._place(site)[1] == "in":
                    handles += self._edit_resid_mid(change)
                else:
                    handles.append(self._hook(site, change))
        return handles

    def _place(self, site: str) -> tuple[str, str]:
        """The site's module in the block, and its end: "in" or "out"."""
        ends = {"resid_pre": "in", "resid_post": "out"}
        module, _, end = self._map.sites.get(site, f".{ends.get(site)}").rpartition(".")
        return module, end

    def _hook(self, site: str, change: Change) -> Handle:
        """Call `change` with the tensor at the site's place."""
        name, end = self._place(site)
        module = self.block.get_submodule(name)
        if end == "in":
            return module.register_forward_pre_hook(_before(change), with_kwargs=True)
        return module.register_forward_hook(_after(change))

    def _edit_resid_mid(self, change: Change) -> list[Handle]:
        """Edit the input of the FFN, and add the same change to the step's output, because the
        residual carries the same state past the FFN."""
        carried: list[Tensor] = []

        def before_ffn(x: Tensor) -> Tensor | None:
            carried.clear()
            new = change(x)
            if new is not None:
                carried.append(new - x)
            return new

        return [
            self._hook("resid_mid", before_ffn),
            self._hook("resid_post", lambda x: x + carried.pop() if carried else None),
        ]


def _before(change: Change) -> Callable[..., Any]:
    """A pre-hook that changes the tokens that a module reads, given by position or by name."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = tokens_of(module, args, kwargs)
        new = None if tokens is None else change(tokens)
        return None if new is None else tuple(with_tokens(module, args, kwargs, new))

    return hook


def _after(change: Change) -> Callable[..., Any]:
    """A hook that changes a module's output, or the first tensor in it."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        tensor = first_tensor(output)
        new = None if tensor is None else change(tensor)
        return None if new is None else with_first(output, new)

    return hook
