"""Names of sites, steps and tokens; addresses of units, as `mlp_post[5]:1234`.

A **step** t = 1..T is the t-th application of the block. In a stacked ViT it is a block. Step 0 is
the embedded tokens z_0, and -1 is the last step. A **site** is a place inside a step, named as in
TransformerLens. The sites of an inner update (bViT-fl, bViT-sc) have a prefix with its number from
1, as in `inner2.mlp_post`. Shapes: B images, N tokens (prefix and patches), D width, F hidden width
of the FFN, H heads, E head width, Q query tokens, K key tokens (both N).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from bvit_interp.errors import UserError, choices

SITES: dict[str, tuple[str, str]] = {
    "resid_pre": ("B N D", "input of the step, z_{t-1}"),
    "q": ("B N H E", "queries"),
    "k": ("B N H E", "keys"),
    "v": ("B N H E", "values"),
    "scores": ("B H Q K", "attention before softmax, scaled"),
    "pattern": ("B H Q K", "attention after softmax"),
    "z": ("B N H E", "head outputs before the projection"),
    "attn_out": ("B N D", "what attention adds to the residual"),
    "resid_mid": ("B N D", "residual between attention and FFN"),
    "mlp_pre": ("B N F", "FFN before GELU"),
    "mlp_post": ("B N F", "FFN after GELU: the neurons"),
    "mlp_out": ("B N D", "what the FFN adds to the residual"),
    "resid_post": ("B N D", "output of the step, z_t"),
}
"""Site -> (shape, meaning); the README has this table.

In a model with a memory m_t the block of a step reads z_{t-1} + m_t + e_t, but `resid_pre` is still
z_{t-1}. In an inner update `resid_pre` is the input of its block, m + z_{t-1} (+ e_t), and
`resid_post` is the new memory.
"""

IGNORE = 1000
"""Id of mask pixels that are neither object nor background (ImageNet-S)."""

AdapterMode = Literal["probe", "te", "full", "lora-qv", "lora-ffn"]
"""What an adapter trains: the head, a time embedding, all weights, or low-rank updates."""

TOKEN_WORDS = ("cls", "dist", "reg", "patches", "all")
Tokens = str | int | slice
"""Which tokens: cls | dist | reg | patches | all, an int or a slice; an int, cls and dist drop the
axis."""

_INNER = re.compile(r"inner(?P<update>[1-9]\d{0,3})\.(?P<site>\w+)", re.ASCII)
_ADDRESS = re.compile(r"(?P<site>[\w.]+)(?:\[(?P<step>-?\d+|\*)\])?(?::(?P<unit>\d+))?")


@dataclass(frozen=True)
class Address:
    """A site at a step, or one unit of it: `z[5]`, `z[5]:3` (head 3), `inner2.mlp_post[5]:1234`
    (neuron 1234)."""

    site: str
    step: int
    unit: int | None = None

    def __post_init__(self) -> None:
        check_site(self.site)

    def __str__(self) -> str:
        return f"{self.site}[{self.step}]" + ("" if self.unit is None else f":{self.unit}")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `site[step]` or `site[step]:unit`."""
        site, step, unit = split_address(text)
        if step is None:
            raise UserError(
                f"not an address: {text!r}; expected site[step] or site[step]:unit, as"
                " mlp_post[5]:1234"
            )
        return cls(site, step, unit)


def split_address(text: str) -> tuple[str, int | None, int | None]:
    """Site, step and unit of ``site``, ``site:unit``, ``site[step]`` or ``site[step]:unit``; the
    step is None where every step is meant, as in ``z:3`` and ``z[*]:3``."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"not an address: {text!r}; expected site[step] or site[step]:unit, as"
            " mlp_post[5]:1234, or site:unit for every step"
        )
    step, unit = match["step"], match["unit"]
    return (
        match["site"],
        None if step in (None, "*") else int(step),
        None if unit is None else int(unit),
    )


def check_site(site: str) -> str:
    """Return `site`, or raise a UserError that lists the sites."""
    if place_of(site)[1] not in SITES:
        raise UserError(f"unknown site {site!r}; sites: {choices(SITES, 20)}")
    return site


def place_of(site: str) -> tuple[int, str]:
    """The number of the inner update (0: the step's own block), and the site without its prefix."""
    match = _INNER.fullmatch(site)
    return (0, site) if match is None else (int(match["update"]), match["site"])


def axes_of(site: str) -> list[str]:
    """The letters of a site's shape: ``["B", "N", "F"]``."""
    return SITES[place_of(site)[1]][0].split()


def check_step(step: int, num_steps: int, *, zero: bool = False) -> int:
    """Return `step` counted from 1 (-1 is the last), or raise a UserError; `zero` allows step 0."""
    lowest = 0 if zero else 1
    whole = isinstance(step, Integral) and not isinstance(step, bool)
    counted = num_steps + 1 + step if whole and step < 0 else step
    if not whole or not lowest <= counted <= num_steps:
        raise UserError(f"no step {step!r}; steps: {lowest}..{num_steps} (-1 is the last)")
    return int(counted)


def check_steps(
    steps: Iterable[int] | int | None, num_steps: int, *, zero: bool = False
) -> list[int]:
    """The given steps in their order, counted from 1; None means all steps, without step 0."""
    if steps is None:
        return list(range(1, num_steps + 1))
    listed = list(steps) if isinstance(steps, Iterable) else [steps]
    if not listed:
        raise UserError(f"no step chosen; steps: 1..{num_steps}")
    checked = [check_step(step, num_steps, zero=zero) for step in listed]
    if len(set(checked)) < len(checked):
        raise UserError(f"a step is chosen twice in {listed}")
    return checked


def unit_axis(site: str) -> str:
    """The axis of the units of a site: `H` heads, `F` neurons, `D` channels of the residual."""
    axes = axes_of(site)
    return "H" if "H" in axes else axes[-1]
