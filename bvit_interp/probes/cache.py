"""The tensors that a probe has recorded, by site and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bvit_interp.errors import UserError, choices, first_line
from bvit_interp.models import tensor_file
from bvit_interp.vocabulary import (
    SITES,
    Address,
    check_site,
    check_step,
    place_of,
    split_address,
    unit_axis,
)


def unit_index(site: str, unit: int) -> tuple[object, ...]:
    """Index that picks one unit from a whole site's tensor, with or without its token axis.

    Units are axis 1 of scores and pattern ``(B, H, Q, K)``, the last but one of q, k, v and z, else
    the last.
    """
    if place_of(site)[1] in ("scores", "pattern"):
        return (slice(None), unit)
    return (..., unit, slice(None)) if unit_axis(site) == "H" else (..., unit)


class Cache(Mapping[tuple[str, int], Tensor]):
    """Recorded activations: a mapping from (site, step) to tensors.

    ``cache["pattern", 7]`` is the tensor of step 7, ``cache["pattern"]`` all recorded steps stacked
    on axis 1, ``cache["mlp_post[5]:12"]`` one unit, and ``cache["z:3"]`` head 3 at all recorded
    steps. Shapes are those of `bvit_interp.vocabulary.SITES`; the token axis is gone where one
    token was asked for ("cls", "dist" or an int), as in numpy indexing.

    Attributes
    ----------
    grid : rows and columns of the patch grid of the recorded images.
    """

    def __init__(self, grid: tuple[int, int], num_steps: int) -> None:
        self.grid, self.num_steps = grid, num_steps
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def __setitem__(self, key: tuple[str, int], tensor: Tensor) -> None:
        self._tensors[key] = tensor

    def __getitem__(self, key: str | tuple[str, int] | tuple[str, int, int] | Address) -> Tensor:
        address = Address(*key) if isinstance(key, tuple) else key
        site, at, unit = split_address(str(address))
        if at is not None:
            return _unit(self._at(check_site(site), at), site, unit, str(key))
        of_steps = [self._tensors[site, step] for step in self.steps(site)]
        if len({tensor.shape for tensor in of_steps}) > 1:
            raise UserError(f"{site} has another shape at other steps: ask for one, as {site}[1]")
        return torch.stack([_unit(tensor, site, unit, str(key)) for tensor in of_steps], dim=1)

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

    def __contains__(self, key: object) -> bool:
        site, step = cast(tuple[str, int], key)
        return (
            check_site(site),
            check_step(step, self.num_steps, zero=site == "resid_post"),
        ) in self._tensors

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def to(self, *args: Any, **kwargs: Any) -> Cache:
        """The same cache with every tensor moved or cast, as by `torch.Tensor.to`."""
        moved = Cache(self.grid, self.num_steps)
        for key, tensor in self.items():
            moved[key] = tensor.to(*args, **kwargs)
        return moved

    def cpu(self) -> Cache:
        """The same cache on the CPU."""
        return self.to("cpu")

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file with a tensor named ``site[step]`` for each pair."""
        tensors = {_text(key): tensor for key, tensor in self.items()}
        about = {"grid": self.grid, "num_steps": self.num_steps}
        tensor_file.write(Path(path), "cache", about, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Cache:
        """What `save` wrote.

        Raises
        ------
        UserError
            For a file that is missing, damaged or not a saved cache.
        """
        try:
            about, tensors = tensor_file.read(Path(path), "cache")
            cache = cls(tuple(about["grid"]), int(about["num_steps"]))
            for name, tensor in tensors.items():
                address = Address.parse(name)
                cache[address.site, address.step] = tensor
        except tensor_file.UNREADABLE as error:
            raise UserError(f"{path} is no saved cache ({first_line(error)})") from error
        return cache

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
        held = []
        for site in names:
            steps = self.steps(site)
            shape = "x".join(map(str, self._tensors[site, steps[0]].shape))
            held.append(f"{site} {shape} x {len(steps)} steps")
        return f"Cache({', '.join(held)}; {self.nbytes / 1e6:.1f} MB)"


def _unit(tensor: Tensor, site: str, unit: int | None, key: str) -> Tensor:
    """One unit of a site's tensor, or all of it."""
    if unit is None:
        return tensor
    try:
        index: Any = unit_index(site, unit)
        return tensor[index]
    except IndexError:
        raise UserError(f"{key}: no such unit in a tensor of shape {tuple(tensor.shape)}") from None


def _text(key: tuple[str, int]) -> str:
    return f"{key[0]}[{key[1]}]"
