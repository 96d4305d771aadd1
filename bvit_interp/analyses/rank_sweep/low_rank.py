"""Low-rank FFN weights: which k directions to keep, what their loss costs, and a model that runs on
them.

Every cut is a projection of the output, ``W_k = P_k W`` with P_k onto k orthonormal directions;
biases stay.

- `factors(W)`: those of the largest singular values, the truncated SVD (Eckart & Young, 1936):
  least ||W - W_k||.
- `factors(W, C)`: those in which the outputs live, the eigenvectors of W C W^T with C = E[x x^T] of
  real inputs x: least E||W x - W_k x||^2. These are the weights of SVD-LLM (Wang et al., 2024,
  https://arxiv.org/abs/2403.07378), the truncated SVD of W S times S^-1 with S S^T = C, here
  without the inverse, so that C may be singular. ASVD (Yuan et al., 2023,
  https://arxiv.org/abs/2312.05821) takes a diagonal S.
- `random_factors(W)`: any, the null of both.

Works on a tied unroll: a step's Linear gives way to a module of its own, and no Parameter is ever
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.models.unroll import is_unrolled, unroll

NAMES = ("fc1", "fc2")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of the FFN and the places that apply it.

    Parameters
    ----------
    name : "fc1" (in-projection) or "fc2" (out-projection).
    owners : the modules whose attribute `name` is the Linear; several where a recurrent block
        shares it.
    """

    name: str
    owners: tuple[nn.Module, ...]

    @property
    def linears(self) -> list[nn.Linear]:
        """The Linear of each place."""
        return [getattr(owner, self.name) for owner in self.owners]

    @property
    def weight(self) -> Tensor:
        """W ``(out, in)``."""
        return self.linears[0].weight.detach()


def ffn_matrices(unrolled: VisionTransformer, step: int | None = None) -> list[Matrix]:
    """The distinct FFN weights of a tied unroll, with all their places; or those of one step (from
    1) alone.

    Inner updates of a memory belong to their step.

    Raises
    ------
    UserError
        For a model that is not an unroll, and an FFN that is not made of two Linear layers.
    """
    if not is_unrolled(unrolled):
        raise UserError("FFN weights are cut on a tied unroll: give unroll(model)")
    steps = list(unrolled.blocks)
    owners: dict[tuple[str, int], list[nn.Module]] = {}
    alive = []  # a parametrized weight is made anew at every look: an id must not come back
    for block in steps if step is None else [steps[step - 1]]:
        for each in (block, *getattr(block, "inner", ())):
            for name in NAMES:
                linear = getattr(getattr(each, "mlp", None), name, None)
                if not isinstance(linear, nn.Linear):
                    raise UserError(
                        f"the FFN of a {type(each).__name__} has no Linear {name}: it cannot be cut"
                    )
                alive.append(linear.weight)
                owners.setdefault((name, id(alive[-1])), []).append(each.mlp)
    return [Matrix(name, tuple(places)) for (name, _), places in owners.items()]


# ---- factors -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factors:
    """``W = left @ right``, the directions to keep first.

    Parameters
    ----------
    left : orthonormal columns ``(out, r)`` float64, r = min(out, in).
    right : ``(r, in)`` float64, ``left.T @ W``.
    """

    left: Tensor
    right: Tensor

    @property
    def full_rank(self) -> int:
        """r."""
        return self.right.shape[0]

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """Thin factors ``(out, k)`` and ``(k, in)`` of W_k."""
        return self.left[:, :rank], self.right[:rank]

    def energy(self, rank: int) -> float:
        """||W_k||^2 / ||W||^2 in the Frobenius norm, 0..1; for the SVD the share of squared
        singular values."""
        squared = self.right.square().sum(1)
        return float(squared[:rank].sum() / squared.sum())

    def error(self, rank: int, moment: Tensor) -> float:
        """E||W x - W_k x||^2 / E||W x||^2 over inputs of second moment ``(in, in)``, 0..1."""
        outputs = ((self.right @ moment.to(self.right)) * self.right).sum(
            1
        )  # E of each direction's squared output
        return float((outputs[rank:].sum() / outputs.sum()).clamp(0, 1))


def factors(weight: Tensor, moment: Tensor | None = None) -> Factors:
    """The directions of W ``(out, in)`` by singular value, or by output energy under inputs of
    `moment`.

    Parameters
    ----------
    weight : ``(out, in)``.
    moment : E[x x^T] of the inputs ``(in, in)``, symmetric, positive semi-definite, of any scale.
    """
    left, right = _svd(weight)
    if moment is None:
        return Factors(left, right)
    outputs = (
        right @ moment.to(right) @ right.mT
    )  # W C W^T in the basis `left`: (r, r), also where out > in
    rotation = torch.linalg.eigh((outputs + outputs.mT) / 2).eigenvectors.flip(-1)
    return Factors(left @ rotation, rotation.mT @ right)


def random_factors(weight: Tensor, generator: torch.Generator) -> Factors:
    """Directions of W ``(out, in)`` at random, uniformly (Haar) in its column space; drawn on the
    CPU.

    Drawn among the outputs and projected, so that they do not hang on the signs that a library
    gives singular vectors.
    """
    left, right = _svd(weight)
    drawn = torch.randn(left.shape, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(left.mT @ drawn.to(left)).Q
    return Factors(left @ rotation, rotation.mT @ right)


def _svd(weight: Tensor) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return left, values[:, None] * right


# ---- inputs --------------------------------------------------------------------------------------------

Sums = dict[Matrix, tuple[Tensor, int]]
"""Per matrix the sum of x x^T ``(in, in)`` float64 over the tokens it read, and how many they
were."""


@contextmanager
def watch_inputs(matrices: Iterable[Matrix]) -> Iterator[Sums]:
    """Sum up what each matrix reads, at all its places and of all tokens, while the context
    lasts."""
    found: Sums = {}
    with ExitStack() as hooks:
        for matrix in matrices:

            def add(_: nn.Module, given: tuple[Tensor, ...], matrix: Matrix = matrix) -> None:
                x = given[0].detach().flatten(0, -2).double()
                total, count = found.get(matrix, (0.0, 0))
                found[matrix] = total + x.mT @ x, count + len(x)

            for linear in matrix.linears:
                hooks.callback(linear.register_forward_pre_hook(add).remove)
        yield found


class InputMoments(Metric):
    """Second moments E[x x^T] of what FFN weights read: constant memory, any number of processes.

    Parameters
    ----------
    matrices : the weights; ``8 in^2`` bytes are kept for each.

    Returns
    -------
    ``compute``: matrix -> ``(in, in)`` float64, about zero and not about the mean, for a cut leaves
    the bias.
    """

    full_state_update = False

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        for i, matrix in enumerate(self.matrices):
            width = matrix.weight.shape[1]
            self.add_state(
                f"total{i}", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum"
            )
            self.add_state(f"count{i}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Sums) -> None:
        """Add what `watch_inputs` found in a forward that came to its end."""
        for i, matrix in enumerate(self.matrices):
            total, count = found[matrix]
            if not torch.isfinite(total).all():
                raise UserError(f"the inputs of {matrix.name} hold NaN or infinite values")
            setattr(self, f"total{i}", getattr(self, f"total{i}") + total)
            setattr(self, f"count{i}", getattr(self, f"count{i}") + count)

    def compute(self) -> dict[Matrix, Tensor]:
        """Means over all tokens of all calls."""
        return {
            m: getattr(self, f"total{i}") / getattr(self, f"count{i}")
            for i, m in enumerate(self.matrices)
        }


# ---- a model of low rank -------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A Linear of weight W_k: two thin products where they are the cheaper, else the dense one.

    Parameters
    ----------
    matrices : applied one after the other, the first ``(k, in)`` and the last ``(out, k)``, or one
        ``(out, in)``.
    bias : of the Linear it stands for, ``(out,)`` or None; shared, not copied.
    """

    def __init__(self, matrices: Sequence[Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = matrices[0].shape[1], matrices[-1].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.matrices
        for matrix in inner:
            x = F.linear(x, matrix)
        return F.linear(x, last, self.bias)


def is_thin(rank: int, out_features: int, in_features: int) -> bool:
    """Whether two products with k x (in + out) weights cost less than one with in x out."""
    return rank * (out_features + in_features) < out_features * in_features


@contextmanager
def low_rank(chosen: Mapping[Matrix, Factors], rank: int) -> Iterator[None]:
    """The chosen weights cut to `rank` at all their places while the context lasts.

    At full rank the Linear itself stays: the outputs are the model's own, bit by bit. Hooks that a
    Linear bears do not run while it is out; those set inside the context are the stand-in's.

    Raises
    ------
    UserError
        For a rank below 1 or above a weight's full rank.
    """
    with ExitStack() as undo:
        for matrix, cut in chosen.items():
            if not 1 <= rank <= cut.full_rank:
                raise UserError(f"no rank {rank} of {matrix.name}; ranks: 1..{cut.full_rank}")
            if rank == cut.full_rank:
                continue
            weight, (left, right) = matrix.weight, cut.cut(rank)
            thin = is_thin(rank, *weight.shape)
            products = [
                product.to(weight) for product in ((right, left) if thin else (left @ right,))
            ]
            for owner, linear in zip(matrix.owners, matrix.linears, strict=True):
                undo.callback(setattr, owner, matrix.name, linear)
                setattr(owner, matrix.name, LowRank(products, linear.bias).train(linear.training))
        yield


# ---- the sweep's view of a model -----------------------------------------------------------------------


class TruncatedFFN:
    """A model whose FFN is cut at all steps together or at each alone, on its tied unroll.

    Parameters
    ----------
    model : a `BViT` or any timm `VisionTransformer`.
    each : one step at a time.
    seed : of the random directions, the same at every step.

    Attributes
    ----------
    view : the unroll that is cut; run this.
    steps : "all", or "1" to "T".
    matrices : the weights of all `steps`.
    full_rank : the least of theirs.
    moments : E[x x^T] of what they read (`InputMoments`), to be set before directions are
        "whitened".
    """

    def __init__(self, model: VisionTransformer, each: bool = False, seed: int = 0) -> None:
        self.view, self.seed = unroll(model), seed
        self.device = next(model.parameters()).device
        steps = range(1, len(self.view.blocks) + 1) if each else [None]
        self._by_step = {str(step or "all"): ffn_matrices(self.view, step) for step in steps}
        self.steps = list(self._by_step)
        self.matrices = [matrix for of_step in self._by_step.values() for matrix in of_step]
        self.full_rank = min(min(matrix.weight.shape) for matrix in self.matrices)
        self.moments: dict[Matrix, Tensor] = {}
        self._latest: tuple[tuple[str, str] | None, dict[Matrix, Factors]] = (None, {})

    def factors(self, method: str, step: str) -> dict[Matrix, Factors]:
        """Factors by "svd", "whitened" or "random" of the step's weights; the latest are kept."""
        if self._latest[0] != (method, step):
            generator = torch.Generator().manual_seed(self.seed)
            found = {}
            for matrix in self._by_step[step]:
                if method == "random":
                    found[matrix] = random_factors(matrix.weight, generator)
                else:
                    found[matrix] = factors(
                        matrix.weight, self.moments[matrix] if method == "whitened" else None
                    )
            self._latest = ((method, step), found)
        return self._latest[1]

    def cut(self, method: str, step: str, rank: int) -> AbstractContextManager[None]:
        """`low_rank` of the step's weights."""
        return low_rank(self.factors(method, step), rank)
