"""The Jacobian of a step at given states, by products alone.

Attention does not mix images, so one product for the batch is the product with every image's own
Jacobian. A product with the transpose is one backward pass. A product with the Jacobian is a
backward pass through that backward pass (Townsend, 2017, "A new trick for calculating Jacobian
vector products"), so both reuse one graph.

Everything is in float64, on a view of the model that owns its weights: with float32, Krylov vectors
would depend on how images are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bvit_interp.models.looped import Model
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.stepping import State, advance
from bvit_interp.models.unroll import run_on

Vectors = Float[Tensor, "batch tokens width"]
"""One vector per image, in the shape of its state."""


@runtime_checkable
class Operator(Protocol):
    """A linear map for each image, from ``(B, N, D)`` to ``(B, N, D)``."""

    def __call__(self, tangent: Vectors) -> Vectors:
        """J v."""

    def adjoint(self, cotangent: Vectors) -> Vectors:
        """J^T u."""


class Linearised:
    """The Jacobian of `step` at states ``(B, N, D)``.

    Parameters
    ----------
    step : a map of states that does not mix images. It must be twice differentiable, so it may not
        use fused attention.
    state : the states. The graph of the step is kept as long as this object lives.

    Attributes
    ----------
    output : the states after the step, ``(B, N, D)``.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], state: Vectors) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._input = state.detach().clone().requires_grad_()
            self._output = step(self._input)
            self._cotangent = torch.zeros_like(self._output, requires_grad=True)
            (self._pulled_back,) = torch.autograd.grad(
                self._output, self._input, self._cotangent, create_graph=True
            )
        self.output = self._output.detach()

    def __call__(self, tangent: Vectors) -> Vectors:
        """J v: the derivative of ``J^T u``, which is linear in u, along v."""
        return torch.autograd.grad(self._pulled_back, self._cotangent, tangent, retain_graph=True)[
            0
        ]

    def adjoint(self, cotangent: Vectors) -> Vectors:
        """J^T u."""
        return torch.autograd.grad(self._output, self._input, cotangent, retain_graph=True)[0]


class Chain:
    """The product of the Jacobians of successive steps, ``J_T ... J_1``.

    Parameters
    ----------
    steps : J_1 first.
    """

    def __init__(self, steps: Sequence[Operator]) -> None:
        self.steps = steps

    def __call__(self, tangent: Vectors) -> Vectors:
        """J_T ... J_1 v."""
        for step in self.steps:
            tangent = step(tangent)
        return tangent

    def adjoint(self, cotangent: Vectors) -> Vectors:
        """J_1^T ... J_T^T u."""
        for step in reversed(self.steps):
            cotangent = step.adjoint(cotangent)
        return cotangent


def push_forward(
    operator: Operator, tangents: Float[Tensor, "batch k tokens width"]
) -> Float[Tensor, "batch k tokens width"]:
    """J times each of k tangents."""
    return torch.stack([operator(tangent) for tangent in tangents.unbind(1)], dim=1)


def gains(
    operator: Operator, probes: Float[Tensor, "batch k tokens width"], kinds: Sequence[slice]
) -> Float[Tensor, "batch kinds kinds"]:
    """How much of a perturbation of tokens of one kind arrives in tokens of another.

    ``||P_b J P_a v|| / ||P_a v||`` for random v, as the root mean square over an image's probes.
    For isotropic v this estimates the Frobenius norm of the block of J divided by the root of its
    number of columns. For the identity it is 1 within a kind and 0 between kinds.

    Parameters
    ----------
    probes : k isotropic random vectors per image.
    kinds : the tokens of each kind.

    Returns
    -------
    Perturbed kind a in the rows, read kind b in the columns.
    """
    by_source = []
    for source in kinds:
        perturbation = torch.zeros_like(probes)
        perturbation[:, :, source] = probes[:, :, source]
        energy = perturbation.square().sum((1, 2, 3))
        response = push_forward(operator, perturbation).square()
        by_source.append(
            torch.stack([response[:, :, read].sum((1, 2, 3)) / energy for read in kinds], dim=1)
        )
    return torch.stack(by_source, dim=1).sqrt()


def differentiable(model: nn.Module, steps: int, permuted: int | None = None) -> Model:
    """The model's steps in float64, with weights of their own.

    The gradient passes everywhere, also where training stops it.

    Parameters
    ----------
    model : is left as it is.
    steps : as `run_on` takes them.
    permuted : seed of a null. The entries of every weight matrix of the blocks' linear layers are
        put in random order, so only their moments stay. Steps that share a block share the order.
    """
    view = run_on(model, steps)
    block_matrices = {
        id(matrix)
        for module in view.blocks.modules()
        if isinstance(module, nn.Linear)
        for matrix in module.parameters(recurse=False)
        if matrix.ndim == 2
    }
    rng = np.random.default_rng(permuted)
    copies: dict[int, Any] = {}
    for module in view.modules():
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            if id(tensor) not in copies:
                copy = tensor.detach().double() if tensor.is_floating_point() else tensor
                if permuted is not None and id(tensor) in block_matrices:
                    order = torch.from_numpy(rng.permutation(copy.numel())).to(copy.device)
                    copy = copy.flatten()[order].reshape(copy.shape)
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = (
                    nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                )
            setattr(module, name, copies[id(tensor)])
        if isinstance(module, MemoryBlock):  # a gradient that training stops is part of the map
            module.memory = replace(module.memory, gradient="full")
    return view


def pack(view: Model, state: State) -> Vectors:
    """All that later steps depend on, as tokens: z, or z and m ``(B, 2 N, D)`` with a memory."""
    if not isinstance(view.blocks[0], MemoryBlock):
        return state.tokens
    memory = torch.zeros_like(state.tokens) if state.memory is None else state.memory
    return torch.cat([state.tokens, memory], dim=1)


def unpack(view: Model, packed: Vectors, like: State) -> State:
    """`like` with other tokens, and with a memory another memory: the inverse of `pack`.

    What else a step reads, such as the images of a loop with input injection, stays as in `like`.
    """
    if not isinstance(view.blocks[0], MemoryBlock):
        return replace(like, tokens=packed)
    tokens, memory = packed.chunk(2, dim=1)
    return replace(like, tokens=tokens, memory=memory)


def step_map(view: Model, before: State) -> Callable[[Tensor], Tensor]:
    """The step that follows the state `before`, as a map of packed states.

    Attention runs torch's plain kernel, because the fused one has no second derivative.
    """

    def step(packed: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return pack(view, advance(view, unpack(view, packed, before)))

    return step


def jacobians_along(view: Model, state: State) -> Iterator[Linearised]:
    """The Jacobian of every step of the run that starts at this state."""
    for _ in range(state.step, len(view.blocks)):
        jacobian = Linearised(step_map(view, state), pack(view, state))
        yield jacobian
        with torch.no_grad():
            state = advance(view, state)
