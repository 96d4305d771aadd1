"""Linear decoding of the step from the state of single tokens.

Linear discriminant analysis (Fisher, 1936): the steps share one covariance and are equally
frequent. It is fitted from sums, so that states are not kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.metrics.checks import check_finite

FEATURES = ("raw", "direction", "norm")
"""What a decoder reads of a state: all of it, z / ||z||, or the logarithm of ||z|| alone."""


def feature(tokens: Float[Tensor, "*batch width"], name: str) -> Float[Tensor, "*batch features"]:
    """One of `FEATURES` of states, float64; `norm` has one number per state."""
    tokens = tokens.double()
    norm = tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return {"raw": tokens, "direction": tokens / norm, "norm": norm.log()}[name]


class StepSums:
    """Sums over tokens from which steps are learned.

    No dataclass: torchmetrics would squeeze the tensors of one.

    Parameters
    ----------
    gram : X^T X over the tokens of all steps.
    sums : sum of the tokens of each step.
    count : number of tokens of each step.

    Attributes
    ----------
    means : mean token of each step.
    """

    def __init__(
        self,
        gram: Float[Tensor, "width width"],
        sums: Float[Tensor, "steps width"],
        count: Float[Tensor, " steps"],
    ) -> None:
        self.gram, self.sums, self.count = gram, sums, count
        self.means = sums / count[:, None]


class StepMoments(Metric):
    """`StepSums` over a data set: constant memory, any number of processes.

    Parameters
    ----------
    steps, width : T and D.
    """

    full_state_update = False
    gram: Tensor
    sums: Tensor
    count: Tensor

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        shapes = {"gram": (width, width), "sums": (steps, width), "count": (steps,)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Float[Tensor, "*batch width"], step: int) -> None:
        """Add float64 states of tokens at a step, from 1."""
        flat = check_finite(values).flatten(0, -2)
        self.gram += flat.T @ flat
        self.sums[step - 1] += flat.sum(0)
        self.count[step - 1] += len(flat)

    def compute(self) -> StepSums:
        """The sums over all processes."""
        if not self.count.all():
            raise UserError("no image is left to learn the steps from")
        return StepSums(self.gram, self.sums, self.count)


class LinearDiscriminant:
    """Linear discriminant analysis of the step.

    Parameters
    ----------
    sums : over the tokens that it is fitted to.
    ridge : added to the covariance, as a share of its mean diagonal.
    """

    def __init__(self, sums: StepSums, ridge: float) -> None:
        means, n = sums.means, sums.count.sum()
        covariance = (sums.gram - sums.sums.T @ means) / n
        least = 1e-12 * sums.gram.diagonal().mean() / n  # where all images are the same
        scale = torch.maximum(covariance.diagonal().mean(), least)
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        self.weight = torch.linalg.solve(covariance + ridge * scale * identity, means.T)
        self.bias = -(self.weight.T * means).sum(1) / 2

    def __call__(self, values: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch steps"]:
        """Score of every step for float64 states."""
        return values @ self.weight + self.bias


def decoding_scores(
    scores: Float[Tensor, "batch tokens steps steps"],
) -> Float[Tensor, "batch steps_and_mean 3"]:
    """How well steps are decoded, for each image.

    Parameters
    ----------
    scores : of `LinearDiscriminant`, for tokens at each step (third axis) and candidate steps.

    Returns
    -------
    For each step, and last the mean over steps: share of tokens whose step is right; error in
    steps; pair accuracy. Pair accuracy is the share of the other steps from which a step is told
    apart by forced choice: which of two states of a token belongs to which step. The biases cancel
    there, so a linear decoder of states whose steps have equal means is right half of the time,
    however much the steps differ in spread.
    """
    steps = scores.shape[-1]
    error = (scores.argmax(-1) - torch.arange(steps, device=scores.device)).abs().double()
    true_scores = scores.diagonal(dim1=-2, dim2=-1)
    margin = true_scores[..., None] + true_scores[..., None, :] - scores - scores.mT
    right = (margin > 0).double()
    pairs = (right.sum(-1) - right.diagonal(dim1=-2, dim2=-1)) / (steps - 1)
    by_step = torch.stack([(error == 0).double(), error, pairs], dim=-1).mean(1)
    return torch.cat([by_step, by_step.mean(1, keepdim=True)], dim=1)
