"""A model whose FFN weights are cut to rank k.

Works on a tied unroll: a step's Linear is replaced by a module of its own while a context lasts.
No Parameter is written, and biases stay. `factors` chooses the directions that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bvit_interp.analyses.rank_sweep.factors import Factors, factors, random_factors
from bvit_interp.errors import UserError
from bvit_interp.models.attention import unfused
from bvit_interp.models.looped import Model
from bvit_interp.models.unroll import is_unrolled
from bvit_interp.probes.sites import FFN_MATRICES, Step


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of the FFN and the layers that apply it.

    Parameters
    ----------
    name : "fc1" (in-projection) or "fc2" (out-projection).
    owners : the modules that hold its Linear, each with the attribute; several where a recurrent
        block shares the weight.
    """

    name: str
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def linears(self) -> list[nn.Linear]:
        """The Linear of each owner."""
        return [getattr(owner, attribute) for owner, attribute in self.owners]

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """W."""
        return self.linears[0].weight.detach()


def ffn_matrices(unrolled: Model, step: int | None = None) -> list[Matrix]:
    """The distinct FFN weights of a tied unroll with all layers that apply them, or those of one
    step.

    Inner updates of a memory belong to their step.

    Parameters
    ----------
    unrolled : a tied unroll or a stacked ViT.
    step : from 1; by default all steps.

    Raises
    ------
    UserError
        For a model that is not an unroll, and an FFN that is not made of two Linear layers.
    """
    if not is_unrolled(unrolled):
        raise UserError("FFN weights are cut on a tied unroll: give unroll(model)")
    blocks = list(unrolled.blocks) if step is None else [unrolled.blocks[step - 1]]
    owners: dict[tuple[str, int], list[tuple[nn.Module, str]]] = {}
    alive = []  # a parametrized weight is made at each access: its id must not come back
    for part in (part for block in map(Step, blocks) for part in (block, *block.inner)):
        for name in FFN_MATRICES:
            owner, attribute = part.linear_of(name)
            alive.append(getattr(owner, attribute).weight)
            owners.setdefault((name, id(alive[-1])), []).append((owner, attribute))
    return [Matrix(name, tuple(holders)) for (name, _), holders in owners.items()]


@contextmanager
def low_rank(cuts: Mapping[Matrix, Factors], rank: int) -> Iterator[None]:
    """These weights are cut to `rank` in all their layers while the context lasts.

    At full rank the Linear itself stays: the outputs are the model's own, bit by bit. Hooks on a
    replaced Linear do not run. Hooks that are set inside the context are on the replacement.

    Raises
    ------
    UserError
        For a rank below 1 or above a weight's full rank.
    """
    with unfused(), ExitStack() as undo:
        for matrix, kept in cuts.items():
            if not 1 <= rank <= kept.full_rank:
                raise UserError(f"no rank {rank} of {matrix.name}; ranks: 1..{kept.full_rank}")
            if rank == kept.full_rank:
                continue
            weight, (left, right) = matrix.weight, kept.cut(rank)
            outputs, inputs = weight.shape
            thin = is_thin(rank, outputs, inputs)
            products = [
                product.to(weight) for product in ((right, left) if thin else (left @ right,))
            ]
            for (owner, attribute), linear in zip(matrix.owners, matrix.linears, strict=True):
                undo.callback(setattr, owner, attribute, linear)
                setattr(owner, attribute, LowRank(products, linear.bias).train(linear.training))
        yield


class LowRank(nn.Module):
    """A Linear of weight W_k: two thin products where they cost less, else the dense one.

    Parameters
    ----------
    matrices : applied one after the other, the first ``(k, inputs)`` and the last ``(outputs, k)``;
        or one ``(outputs, inputs)``.
    bias : ``(outputs,)`` or None; shared with the original Linear, not copied.
    """

    bias: nn.Parameter | None

    def __init__(self, matrices: Sequence[Float[Tensor, "_ _"]], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        self.register_parameter("bias", bias)
        self.in_features, self.out_features = matrices[0].shape[1], matrices[-1].shape[0]

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        *inner, last = self.matrices
        for matrix in inner:
            x = F.linear(x, matrix)
        return F.linear(x, last, self.bias)


def is_thin(rank: int, outputs: int, inputs: int) -> bool:
    """Whether two products with rank x (inputs + outputs) weights cost less than the dense one."""
    return rank * (outputs + inputs) < outputs * inputs


class Truncation:
    """The cuts of a model's FFN weights, by method and step.

    Parameters
    ----------
    matrices : step -> the weights to cut; the key may be any name of a set of steps.
    moments : E[x x^T] of what each weight reads (`input_moments.InputMoments`); needed for
        "whitened" and for the errors.
    seed : random seed for the directions, the same at every step.
    """

    def __init__(
        self,
        matrices: Mapping[str, Sequence[Matrix]],
        moments: Mapping[Matrix, Float[Tensor, "inputs inputs"]],
        seed: int = 0,
    ) -> None:
        self.matrices = dict(matrices)
        self.moments = dict(moments)
        self.seed = seed
        self._latest: tuple[tuple[str, str], dict[Matrix, Factors]] | None = None

    def factors(self, method: str, step: str) -> dict[Matrix, Factors]:
        """Factors of the step's weights by "svd", "whitened" or "random"; the latest are kept."""
        if self._latest is None or self._latest[0] != (method, step):
            generator = torch.Generator().manual_seed(self.seed)
            chosen = {
                matrix: self._choose(matrix, method, generator) for matrix in self.matrices[step]
            }
            self._latest = (method, step), chosen
        return self._latest[1]

    def cut(self, method: str, step: str, rank: int) -> AbstractContextManager[None]:
        """`low_rank` of the step's weights."""
        return low_rank(self.factors(method, step), rank)

    def _choose(self, matrix: Matrix, method: str, generator: torch.Generator) -> Factors:
        if method == "random":
            return random_factors(matrix.weight, generator)
        if method == "whitened":
            return factors(matrix.weight, self.moments[matrix])
        return factors(matrix.weight)
