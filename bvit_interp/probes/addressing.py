"""The steps of a model, and the addresses of sites in them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from bvit_interp.errors import UserError, choices
from bvit_interp.models.attention import watching
from bvit_interp.models.dry_run import dry, example_images
from bvit_interp.models.families import OF_MODULES
from bvit_interp.models.layout import layout_of
from bvit_interp.probes.sites import Step
from bvit_interp.vocabulary import (
    SITES,
    TOKEN_WORDS,
    Address,
    Tokens,
    check_site,
    check_step,
    check_steps,
    place_of,
    split_address,
    unit_axis,
)

Key = str | tuple[str, int] | tuple[str, int, int] | Address
"""A site name, or an address in any of its forms."""
Shapes = dict[tuple[str, int], tuple[int, ...] | str]
"""Shape of an activation by site and step, or why there is none."""
_SIZES = {
    "H": ("z", 2, "numbers of heads"),
    "E": ("z", 3, "widths of heads"),
    "F": ("mlp_post", 2, "numbers of neurons"),
}
"""Axis -> a site that has it, its position in that site's tensor, and what it counts."""


class Enough(Exception):
    """Raised to end the forward when everything that was asked for is recorded."""


_known: weakref.WeakKeyDictionary[nn.Module, StepSites] = weakref.WeakKeyDictionary()


def sites_of(view: nn.Module) -> StepSites:
    """The `StepSites` of a tied unroll; it stays the same as long as the blocks do."""
    blocks: Any = view.blocks
    known = _known.get(view)
    if known is None or [step.block for step in known.steps] != list(blocks):
        known = _known[view] = StepSites(view)
    return known


class StepSites:
    """The steps of a tied unroll, with their sites and sizes.

    Parameters
    ----------
    view : from `unroll`. A dry run of one image tells how many heads and neurons each step has, and
        which modules run more than once per step.

    Attributes
    ----------
    steps : the block of each step, with its sites.
    layout : image size, patch grid, kinds of prefix tokens, width and classes.
    """

    def __init__(self, view: Any) -> None:
        self.layout = layout_of(view)
        self.steps = [Step(block) for block in view.blocks]
        self._shapes = self._dry_shapes(view)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_heads(self) -> int:
        """Number of heads of a step."""
        return self._common("H")

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self._common("E")

    @property
    def num_neurons(self) -> int:
        """Number of neurons of a step: the inputs of the FFN's last projection."""
        return self._common("F")

    def size(self, axis: str, step: int) -> int:
        """Number of heads (axis H), width of a head (E) or number of neurons (F) of a step.

        Raises
        ------
        UserError
            If the step has none; the message says why.
        """
        site, place, _ = _SIZES[axis]
        shape = self._shapes[site, step]
        if isinstance(shape, str) and axis == "H":  # some blocks show only their pattern
            shape, place = self._shapes["pattern", step], 1
        if isinstance(shape, str):
            raise UserError(shape)
        return shape[place]

    def _common(self, axis: str) -> int:
        """The size that all steps have."""
        sizes = [self.size(axis, step) for step in range(1, len(self) + 1)]
        if len(set(sizes)) > 1:
            raise UserError(f"the steps differ in their {_SIZES[axis][2]}: {choices(sizes, 24)}")
        return sizes[0]

    def _dry_shapes(self, view: nn.Module) -> Shapes:
        """Shape of each site that sizes are read from, by site and step, or why there is none."""
        image = example_images(view, self.layout.image_size, self.layout.channels)[:1]
        shapes, is_whole = self._dry_pass(view, image, ("z", "k", *OF_MODULES))
        if not is_whole:  # one of these sites ended the forward
            for sites in (("z",), ("k",), OF_MODULES):
                shapes |= self._dry_pass(view, image, sites)[0]
        if any(isinstance(shapes["z", step], str) for step in range(1, len(self) + 1)):
            shapes |= self._dry_pass(view, image, ("pattern",))[0]
        return shapes

    def _dry_pass(
        self, view: nn.Module, image: Tensor, sites: Sequence[str]
    ) -> tuple[Shapes, bool]:
        """The shapes of `sites` in one forward, and whether it ran to its end.

        A site whose module runs more than once per step is refused from now on.
        """
        shapes: Shapes = {}
        repeated: set[tuple[str, int]] = set()

        def keep(activation: Tensor, key: tuple[str, int]) -> None:
            if key in shapes:
                repeated.add(key)
            shapes[key] = tuple(activation.shape)

        reason = ""
        with dry(view), watching(), contextlib.ExitStack() as hooks:
            refused: Shapes = {}
            for t, site in itertools.product(range(1, len(self) + 1), sites):
                try:
                    taken = functools.partial(keep, key=(site, t))
                    handle = self.steps[t - 1].record(site, slice(None), taken)
                except UserError as error:
                    refused[site, t] = str(error)
                else:
                    hooks.callback(handle.remove)
            try:
                view(image)
            except UserError as error:
                reason = str(error)
        for t, site in itertools.product(range(1, len(self) + 1), sites):
            shapes.setdefault((site, t), refused.get((site, t)) or reason or unseen(site))
        for site, t in repeated:
            shapes[site, t] = self.steps[t - 1].refuse_repeated(site)
        return shapes, not reason

    def address(self, key: Key) -> Address:
        """The address with its step counted from 1, checked against this model."""
        address = Address(*key) if isinstance(key, tuple) else key
        address = Address.parse(address) if isinstance(address, str) else address
        step = check_step(address.step, len(self))
        self.block(address.site, step)
        if address.unit is not None:
            word, units = self._units(address.site, step)
            if not 0 <= address.unit < units:
                raise UserError(
                    f"{address}: no {word} {address.unit}; {word}s: 0..{units - 1} at step {step}"
                )
        return Address(address.site, step, address.unit)

    def everywhere(self, key: Key) -> list[Address]:
        """The addresses that a key means: ``z:3`` and ``z[*]:3`` are head 3 at every step."""
        if isinstance(key, str):
            site, step, unit = split_address(key)
            if step is None:
                having = self.places(site, None)
                return [self.address(Address(site, each, unit)) for _, each in having]
        return [self.address(key)]

    def _units(self, site: str, step: int) -> tuple[str, int]:
        """The word for a unit of the site, and how many of them the step has."""
        axis = unit_axis(site)
        keys = self._shapes["k", step]
        if place_of(site)[1] in ("k", "v") and not isinstance(keys, str):
            return "head", keys[2]  # fewer than query heads, if groups of these share one
        if axis == "H":
            return "head", self.size("H", step)
        return ("neuron", self.size("F", step)) if axis == "F" else ("channel", self.layout.width)

    def rows(self, tokens: Tokens, count: int) -> tuple[slice, bool]:
        """The slice of `count` tokens that `tokens` means, and whether it is one token whose axis
        is dropped."""
        if isinstance(tokens, str):
            if tokens not in TOKEN_WORDS:
                raise UserError(
                    f"unknown tokens {tokens!r}; tokens: {', '.join(TOKEN_WORDS)}, an int or a"
                    " slice"
                )
            prefix = self.layout.prefix
            if tokens == "cls" and "cls" not in prefix:
                raise UserError(
                    "this model has no CLS token; its tokens: patches, all, an int or a slice"
                )
            words = {"patches": slice(len(prefix), count), "all": slice(0, count)}
            first = prefix.index(tokens) if tokens in prefix else 0
            kind = slice(first, first + prefix.count(tokens))
            chosen, single = words.get(tokens, kind), tokens in ("cls", "dist")
        elif isinstance(tokens, slice):
            chosen, single = tokens, False
        else:
            index = range(count)[tokens] if -count <= tokens < count else count
            chosen, single = slice(index, index + 1), True
        if not range(count)[chosen]:
            raise UserError(
                f"tokens {tokens!r} selects none of the {count} tokens"
                f" ({self.layout.num_prefix_tokens} of them before the patches)"
            )
        return chosen, single

    def kinds(self) -> dict[str, slice]:
        """The kinds of token the model has, and where each is: cls, reg, dist, patches."""
        having = [kind for kind in ("cls", "reg", "dist") if kind in self.layout.prefix]
        return {kind: self.rows(kind, self.layout.num_tokens)[0] for kind in (*having, "patches")}

    def targets(
        self, sites: Key | Sequence[Key], steps: Iterable[int] | int | None
    ) -> list[tuple[str, int]]:
        """The (site, step) pairs that several keys mean, each once."""
        one = isinstance(sites, (str, Address)) or (
            isinstance(sites, tuple) and [*map(type, sites)] == [str, int]
        )
        listed: list[Key] = [cast(Key, sites)] if one else list(cast(Sequence[Key], sites))
        if not listed:
            raise UserError(f"no site chosen; sites: {', '.join(SITES)}")
        steps = list(steps) if isinstance(steps, Iterable) else steps
        return list(dict.fromkeys(pair for key in listed for pair in self.places(key, steps)))

    def places(self, key: Key, steps: Sequence[int] | int | None) -> list[tuple[str, int]]:
        """The (site, step) pairs that a site name at `steps`, or an address, means."""
        if not isinstance(key, str) or split_address(key)[1] is not None:
            address = self.address(key)
            return [(address.site, address.step)]
        site = check_site(split_address(key)[0])
        chosen = check_steps(steps, len(self), zero=site == "resid_post")
        update, _ = place_of(site)
        if steps is None and (
            having := [step for step in chosen if update <= len(self.steps[step - 1].inner)]
        ):
            chosen = having
        for step in chosen:
            self.block(site, step)
        return [(site, step) for step in chosen]

    def block(self, site: str, step: int) -> tuple[Step, str]:
        """The block that has the site in a step (counted from 1), and the site's name there."""
        update, name = place_of(site)
        own = self.steps[step - 1]
        if update <= len(own.inner):
            block = own if update == 0 else own.inner[update - 1]
            block.require(name)
            return block, name
        having = [t for t, each in enumerate(self.steps, start=1) if update <= len(each.inner)]
        if having:
            there = choices(having, 24)
            raise UserError(
                f"{site}: step {step} has no inner update {update}; steps that have it: {there}"
            )
        most = max(len(each.inner) for each in self.steps)
        there = f"has inner1..inner{most} only" if most else f"has none; sites: {', '.join(SITES)}"
        raise UserError(f"{site}: this model {there}")


def unseen(sites: str) -> str:
    """The message for sites that a forward did not reach."""
    return (
        f"the forward ended without {sites}: the block does not call what the site stands for, or a"
        " module was replaced"
    )
