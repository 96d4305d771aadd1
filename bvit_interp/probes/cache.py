"""What a probe has recorded: tensors by site and step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bvit_interp.errors import UserError, choices
from bvit_interp.vocabulary import SITES, Address, check_site, check_step, place_of, unit_axis


def unit_index(site: str, unit: int) -> tuple[object, ...]:
    """Index that picks one unit from a whole site's tensor, whatever the token axis has become.

    Units are axis 1 of scores and pattern ``(B, H, Q, K)``, the last but one of q, k, v and z, else
    the last.
    """
    if place_of(site)[1] in ("scores", "pattern"):
        return (slice(None), unit)
    return (..., unit, slice(None)) if unit_axis(site) == "H" else (..., unit)


class Cache:
    """Recorded activations.

    ``cache["pattern", 7]`` is the tensor of step 7, ``cache["pattern"]`` all recorded steps stacked
    on axis 1, ``cache["mlp_post[5]:12"]`` one unit. Shapes are those of
    `bvit_interp.vocabulary.SITES`; the token axis is gone where one token was asked for ("cls" or
    an int), as numpy indexing has it.

    Attributes
    ----------
    grid : rows and columns of the patch grid of the recorded images.
    """

    def __init__(self, grid: tuple[int, int], num_steps: int) -> None:
        self.grid, self.num_steps = grid, num_steps
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def __setitem__(self, key: tuple[str, int], tensor: Tensor) -> None:
        self._tensors[key] = tensor

    def __getitem__(self, key: str | tuple[str, int] | Address) -> Tensor:
        if isinstance(key, tuple):
            site, step = key
            return self._at(check_site(site), step)
        if isinstance(key, Address) or "[" in key:
            address = key if isinstance(key, Address) else Address.parse(key)
            tensor = self._at(address.site, address.step)
            if address.unit is None:
                return tensor
            try:
                index: Any = unit_index(address.site, address.unit)
                return tensor[index]
            except IndexError:
                raise UserError(
                    f"{address}: no such unit in a tensor of shape {tuple(tensor.shape)}"
                ) from None
        return torch.stack([self._tensors[key, step] for step in self.steps(key)], dim=1)

    def _at(self, site: str, step: int) -> Tensor:
        counted = check_step(step, self.num_steps, zero=site == "resid_post")
        if (site, counted) not in self._tensors:
            raise UserError(
                f"{site}[{step}] was not recorded; recorded: {choices(map(_text, self))}"
            )
        return self._tensors[site, counted]

    def steps(self, site: str) -> list[int]:
        """Recorded steps of a site, in order."""
        found = sorted(step for name, step in self._tensors if name == check_site(site))
        if not found:
            raise UserError(
                f"{site} was not recorded; recorded: {choices(dict.fromkeys(s for s, _ in self))}"
            )
        return found

    def __contains__(self, key: tuple[str, int]) -> bool:
        site, step = key
        return (
            check_site(site),
            check_step(step, self.num_steps, zero=site == "resid_post"),
        ) in self._tensors

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes kept alive by the recorded tensors."""
        return sum(t.untyped_storage().nbytes() for t in self._tensors.values())

    def __repr__(self) -> str:
        order = list(SITES)
        names = sorted(
            {name for name, _ in self},
            key=lambda name: (place_of(name)[0], order.index(place_of(name)[1])),
        )
        sites = {site: len(self.steps(site)) for site in names}
        held = ", ".join(f"{site} x {n} steps" for site, n in sites.items())
        return f"Cache({held}; {self.nbytes / 1e6:.1f} MB)"


def _text(key: tuple[str, int]) -> str:
    return f"{key[0]}[{key[1]}]"
