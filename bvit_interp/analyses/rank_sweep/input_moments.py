"""Second moments of what FFN weights read, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bvit_interp.analyses.rank_sweep.low_rank import Matrix
from bvit_interp.metrics.checks import check_finite

InputSums = dict[Matrix, tuple[Tensor, int]]
"""Per matrix the sum of x x^T ``(inputs, inputs)`` float64 over the tokens it read, and the number
of tokens."""


@contextmanager
def watch_inputs(matrices: Iterable[Matrix]) -> Iterator[InputSums]:
    """Sum up what each matrix reads, in all its layers and over all tokens, while the context
    lasts."""
    sums: InputSums = {}

    def reader(matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).double()
            total, count = x.mT @ x, len(x)
            if matrix in sums:
                total, count = sums[matrix][0] + total, sums[matrix][1] + count
            sums[matrix] = total, count

        return read

    with ExitStack() as hooks:
        for matrix in matrices:
            for linear in matrix.linears:
                hooks.callback(linear.register_forward_pre_hook(reader(matrix)).remove)
        yield sums


class InputMoments(Metric):
    """Second moments E[x x^T] of what FFN weights read: constant memory, any number of processes.

    Parameters
    ----------
    matrices : the weights; ``8 inputs^2`` bytes are kept for each.

    Returns
    -------
    ``compute``: matrix -> ``(inputs, inputs)`` float64. The moments are about zero and not about
    the mean, because a cut keeps the bias.
    """

    full_state_update = False

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        for i, matrix in enumerate(self.matrices):
            width = matrix.weight.shape[1]
            total = torch.zeros(width, width, dtype=torch.float64)
            self.add_state(f"total{i}", total, dist_reduce_fx="sum")
            self.add_state(f"count{i}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, sums: InputSums) -> None:
        """Add the sums of `watch_inputs` over one complete forward."""
        for i, matrix in enumerate(self.matrices):
            total, count = sums[matrix]
            check_finite(total, f"the inputs of {matrix.name}")
            setattr(self, f"total{i}", getattr(self, f"total{i}") + total)
            setattr(self, f"count{i}", getattr(self, f"count{i}") + count)

    def compute(self) -> dict[Matrix, Tensor]:
        """Means over all tokens of all calls."""
        return {
            matrix: getattr(self, f"total{i}") / getattr(self, f"count{i}")
            for i, matrix in enumerate(self.matrices)
        }
