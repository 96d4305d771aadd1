"""Random numbers that depend only on what they are drawn for.

They never depend on how far a process has come. A run that was killed therefore continues with the
same images, with any number of workers and on any device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


class Draws:
    """A table of uniform random numbers; any row can be computed without the others.

    Row r of a key's table is exactly the same whether it is computed alone, in a worker, or
    together with all other rows.

    Parameters
    ----------
    key : whole numbers >= 0 that determine the table, for instance (seed, epoch).
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
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch by `numbers`, and restore them at the end.

    The generator of a GPU is seeded too, but not restored: nothing else in training uses it.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  timm draws from it
    try:
        seed_generators(*numbers)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(torch.initial_seed())
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def seed_generators(*numbers: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU) by `numbers`."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(numbers).generate_state(3).tolist()
    torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would also seed the GPUs
    np.random.seed(for_numpy)  # noqa: NPY002
    random.seed(for_python)


def to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copy an array to `device`; a copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
