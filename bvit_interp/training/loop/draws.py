"""Random numbers that are a function of what they are drawn for, never of how far a process has
come.

A run that was killed goes on with the same images, on any number of workers and on any device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


class Draws:
    """A table of uniform random numbers of which any row can be had without the others.

    Row r of the table of one `key` is the same whether it is taken alone, by a worker, or with all
    rows at once.

    Parameters
    ----------
    key : whole numbers >= 0 that the table is a function of, for instance (seed, epoch).
    width : numbers in a row; rounded up to a multiple of 4.
    """

    def __init__(self, key: Sequence[int], width: int) -> None:
        self._key = np.random.SeedSequence(key).generate_state(2, np.uint64)
        self.width = -(-width // 4) * 4  # Philox counts in fours

    def table(self, rows: int) -> np.ndarray:
        """The first `rows` rows, ``(rows, width)`` float64 in 0..1."""
        return np.random.Generator(np.random.Philox(key=self._key)).random((rows, self.width))

    def row(self, r: int) -> np.ndarray:
        """Row r, ``(width,)``."""
        source = np.random.Philox(key=self._key)
        source.advance(r * self.width // 4)
        return np.random.Generator(source).random(self.width)


@contextmanager
def drawn_for(*numbers: int) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's random numbers depend on `numbers` alone; outside
    nothing changes.

    A GPU's generator is seeded too and not put back: nothing else draws from it in training.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  timm draws from it
    try:
        reseed(*numbers)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(torch.initial_seed())
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def reseed(*numbers: int) -> None:
    """Seed the three global generators by `numbers`."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(numbers).generate_state(3).tolist()
    torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would reseed the GPUs too
    np.random.seed(for_numpy)  # noqa: NPY002
    random.seed(for_python)


def sent(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The array on `device`, without making a GPU wait for the host or the host for the GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
