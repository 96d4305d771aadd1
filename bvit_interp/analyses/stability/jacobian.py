"""The Jacobian of a step at a batch of states, by its products alone: singular values, eigenvalues,
exponents.

Attention does not mix images, so one product of the batch is the product of every image's own
Jacobian. Products with the transpose are one backward pass; products with the Jacobian are a
backward pass through that one (Townsend, 2017, "A new trick for calculating Jacobian vector
products"), so both reuse one graph. Largest singular values by Golub & Kahan's (1965)
bidiagonalisation, the spectral radius by Arnoldi's (1951) iteration, both reorthogonalised in full
and with the residual of what they give; exponents along a trajectory by Benettin et al. (1980). All
in float64, on a view of the model that owns its weights: Krylov vectors of float32 would depend on
how images are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bvit_interp.errors import UserError
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.stepping import State, advance
from bvit_interp.models.unroll import run_on


@runtime_checkable
class Operator(Protocol):
    """A linear map of each image's own: tangents ``(B, N, D)`` to tangents ``(B, N, D)``."""

    def __call__(self, tangent: Tensor) -> Tensor:
        """J v."""

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """J^T u."""


class Linearised:
    """The Jacobian of `step` at states ``(B, N, D)``.

    Parameters
    ----------
    step : a differentiable map of states that does not mix images; twice differentiable, so no
        fused attention.
    state : where; the graph of the step is kept as long as this object lives.

    Attributes
    ----------
    output : the states after the step, ``(B, N, D)``.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], state: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._at = state.detach().clone().requires_grad_()
            self._after = step(self._at)
            self._dummy = torch.zeros_like(self._after, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(
                self._after, self._at, self._dummy, create_graph=True
            )
        self.output = self._after.detach()

    def __call__(self, tangent: Tensor) -> Tensor:
        """J v: the derivative of ``J^T u``, which is linear in u, along v."""
        return torch.autograd.grad(self._pulled, self._dummy, tangent, retain_graph=True)[0]

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """J^T u."""
        return torch.autograd.grad(self._after, self._at, cotangent, retain_graph=True)[0]


class Chain:
    """Jacobians of successive steps as one: ``J_T ... J_1``."""

    def __init__(self, steps: Sequence[Operator]) -> None:
        self.steps = steps

    def __call__(self, tangent: Tensor) -> Tensor:
        for step in self.steps:
            tangent = step(tangent)
        return tangent

    def adjoint(self, cotangent: Tensor) -> Tensor:
        for step in reversed(self.steps):
            cotangent = step.adjoint(cotangent)
        return cotangent


# ---- models ------------------------------------------------------------------------------------------


def differentiable(
    model: VisionTransformer, steps: int, permuted: int | None = None
) -> VisionTransformer:
    """The model's steps in float64 with weights of their own, without fused attention, every
    gradient let through.

    Parameters
    ----------
    model : left as it is.
    steps : as `run_on` takes them.
    permuted : the seed of a null: the entries of every weight matrix of the blocks' linear layers
        in random order, so with their moments and nothing else; steps that share a block share the
        order.
    """
    view = run_on(model, steps)
    of_blocks = {
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
                if permuted is not None and id(tensor) in of_blocks:
                    order = torch.from_numpy(rng.permutation(copy.numel())).to(copy.device)
                    copy = copy.flatten()[order].reshape(copy.shape)
                held = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if held else copy
            setattr(module, name, copies[id(tensor)])
        if hasattr(module, "fused_attn"):
            module.__dict__["fused_attn"] = False  # has no second derivative
        if isinstance(module, MemoryBlock):
            module.memory = replace(
                module.memory, gradient="full"
            )  # what training stopped is part of the map
    return view


def pack(view: VisionTransformer, state: State) -> Tensor:
    """All that the steps to come depend on, as tokens: z, and of a model with a memory z and m,
    ``(B, 2 N, D)``."""
    if not isinstance(view.blocks[0], MemoryBlock):
        return state.tokens
    memory = torch.zeros_like(state.tokens) if state.memory is None else state.memory
    return torch.cat([state.tokens, memory], dim=1)


def step_map(view: VisionTransformer, before: int) -> Callable[[Tensor], Tensor]:
    """The step after step `before` as a map of packed states."""

    def step(packed: Tensor) -> Tensor:
        parts = (
            packed.chunk(2, dim=1)
            if isinstance(view.blocks[before], MemoryBlock)
            else (packed, None)
        )
        return pack(view, advance(view, State(parts[0], before, parts[1])))

    return step


def along(view: VisionTransformer, state: State) -> Iterator[Linearised]:
    """The Jacobian of every step of a run that starts at this state."""
    packed = pack(view, state)
    for t in range(state.step, len(view.blocks)):
        linear = Linearised(step_map(view, t), packed)
        packed = linear.output
        yield linear


def seeded_normal(index: Tensor, shape: Sequence[int], *seeds: int) -> Tensor:
    """Standard normal numbers ``(B, *shape)`` float64 of the images at places `index`, the same in
    any batch."""
    drawn = [
        np.random.default_rng((*seeds, int(place))).standard_normal(tuple(shape)) for place in index
    ]
    return torch.from_numpy(np.stack(drawn)).to(index.device)


# ---- what the products give --------------------------------------------------------------------------


@dataclass(frozen=True)
class Singular:
    """Largest singular values of every image, estimated from below.

    Attributes
    ----------
    values : ``(B, k)``, largest first.
    residuals : ``||J^T u - s v|| / s`` of each, ``(B, k)``; a singular value lies within this share
        of the estimate.
    left, right : the unit vectors u and v of the first, ``(B, N, D)``.
    """

    values: Tensor
    residuals: Tensor
    left: Tensor
    right: Tensor


def largest_singular(operator: Operator, start: Tensor, count: int, iterations: int) -> Singular:
    """The `count` largest singular values by `iterations` products with J and as many with its
    transpose.

    As one vector is iterated, a value that J has twice is found once.

    Parameters
    ----------
    start : ``(B, N, D)``, a random vector an image.
    count : at most `iterations`.
    """
    shape, size_of = start.shape[1:], start[0].numel()
    right, left = (start.new_zeros(len(start), iterations + more, size_of) for more in (1, 0))
    alphas, betas = start.new_zeros(2, len(start), iterations)
    right[:, 0], _ = _unit(start.flatten(1))
    for j in range(iterations):
        image = operator(right[:, j].unflatten(1, shape)).flatten(1)
        left[:, j], alphas[:, j] = _unit(_without(image, left[:, :j])[0], alphas[:, 0])
        image = operator.adjoint(left[:, j].unflatten(1, shape)).flatten(1)
        right[:, j + 1], betas[:, j] = _unit(_without(image, right[:, : j + 1])[0], alphas[:, 0])
    p, values, q = torch.linalg.svd(alphas.diag_embed() + betas[:, :-1].diag_embed(1))
    residuals = (betas[:, -1:] * p[:, -1]).abs() / values
    u, v = (
        torch.einsum("bm,bmn->bn", p[:, :, 0], left),
        torch.einsum("bm,bmn->bn", q[:, 0], right[:, :-1]),
    )
    return Singular(
        values[:, :count], residuals[:, :count], u.unflatten(1, shape), v.unflatten(1, shape)
    )


@dataclass(frozen=True)
class Leading:
    """The eigenvalue of largest modulus of every image's Jacobian.

    Attributes
    ----------
    radius : its modulus, ``(B,)``.
    rotates : whether it is one of a complex pair, ``(B,)`` bool.
    residual : ``||J y - l y|| / |l|`` of its unit Ritz vector, ``(B,)``; l is exact for a matrix
        that differs from J by this share of |l|, which for a matrix far from normal need not bound
        the error of l.
    """

    radius: Tensor
    rotates: Tensor
    residual: Tensor


def spectral_radius(operator: Operator, start: Tensor, iterations: int) -> Leading:
    """The spectral radius by `iterations` products with J; `start` ``(B, N, D)``, a random vector
    an image."""
    shape, basis = start.shape[1:], start.new_zeros(len(start), iterations + 1, start[0].numel())
    hessenberg = start.new_zeros(len(start), iterations + 1, iterations)
    basis[:, 0], _ = _unit(start.flatten(1))
    for j in range(iterations):
        image = operator(basis[:, j].unflatten(1, shape)).flatten(1)
        rest, hessenberg[:, : j + 1, j] = _without(image, basis[:, : j + 1])
        basis[:, j + 1], hessenberg[:, j + 1, j] = _unit(rest, image.norm(dim=1))
    below, hessenberg = hessenberg[:, -1, -1], hessenberg[:, :-1]
    values, vectors = torch.linalg.eig(hessenberg.cpu())
    first = values.abs().argmax(1, keepdim=True)
    leading, last = values.gather(1, first)[:, 0], vectors[:, -1].gather(1, first)[:, 0]
    radius = leading.abs().to(start.device)
    return Leading(
        radius,
        (leading.imag.abs() > 1e-9 * leading.abs()).to(start.device),
        below * last.abs().to(start.device) / radius,
    )


def orthonormal(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors ``(B, k, N, D)`` of the same span, and log |R_ii| ``(B, k)`` of the QR
    decomposition."""
    q, r = torch.linalg.qr(vectors.flatten(2).mT)
    return q.mT.unflatten(2, vectors.shape[2:]), r.diagonal(dim1=1, dim2=2).abs().log()


def transported(operator: Operator, vectors: Tensor) -> Tensor:
    """J times each of k tangents ``(B, k, N, D)``."""
    return torch.stack([operator(vector) for vector in vectors.unbind(1)], dim=1)


def gains(operator: Operator, probes: Tensor, kinds: Sequence[slice]) -> Tensor:
    """How much of a perturbation of tokens of one kind comes out in tokens of another.

    ``||P_b J P_a v|| / ||P_a v||`` of random v, root mean square over an image's probes: for
    isotropic v the Frobenius norm of the block of J over the root of its columns. 1 within a kind
    and 0 between kinds for the identity.

    Parameters
    ----------
    probes : isotropic random ``(B, probes, N, D)``.
    kinds : the tokens of each kind.

    Returns
    -------
    ``(B, kinds, kinds)``: of perturbed kind a (rows) and read kind b.
    """
    found = []
    for source in kinds:
        inside = torch.zeros_like(probes)
        inside[:, :, source] = probes[:, :, source]
        size = inside.square().sum((1, 2, 3))
        after = transported(operator, inside)
        found.append(
            torch.stack([after[:, :, kind].square().sum((1, 2, 3)) / size for kind in kinds], dim=1)
        )
    return torch.stack(found, dim=1).sqrt()


def shares(vector: Tensor, kinds: Sequence[slice]) -> Tensor:
    """Shares ``(B, kinds)`` of the energy of ``(B, N, D)`` that lie in the tokens of each kind."""
    energy = vector.square().sum(-1)
    return torch.stack([energy[:, kind].sum(1) for kind in kinds], dim=1) / energy.sum(
        1, keepdim=True
    )


# ---- a whole run -------------------------------------------------------------------------------------


def of_run(
    view: VisionTransformer,
    state: State,
    index: Tensor,
    kinds: Sequence[slice],
    at: Sequence[int],
    horizon: int,
    leading: int,
    iterations: int,
    seed: int,
) -> dict[str, Tensor]:
    """What the analysis `stability` asks of the Jacobians of a run of S steps.

    Parameters
    ----------
    view : of `differentiable`.
    state : step 0, ``(B, N, D)`` float64.
    index : the images' places in the data set ``(B,)``, from which random vectors are drawn.
    kinds : the tokens of each kind K, of packed states.
    at : the P steps whose own Jacobian is looked at.
    horizon : the steps T of `ftle`.

    Returns
    -------
    Per image: `singular` (and `singular_residual`) ``(B, P, leading)``, `radius`
    (`radius_residual`), `rotates` ``(B, P)``, `input_share`, `output_share` ``(B, P, K)``, `gain`
    ``(B, P, K, K)``, `state_growth` ``(B, S)``, `tangent_share` ``(B, S, K)``, `exponent`,
    `exponent_relative` ``(B, S, leading)``, `ftle` (`ftle_residual`), `ftle_relative` ``(B, 1,
    leading)``.
    """
    packed, index = finite(pack(view, state)), index.to(state.tokens.device)
    start, probe = seeded_normal(index, (2, *packed.shape[1:]), seed, 0).unbind(1)
    tangents, _ = orthonormal(seeded_normal(index, (leading, *packed.shape[1:]), seed, 1))
    sizes, steps = [size(packed)], []
    found: dict[str, list[Tensor]] = {}
    for t, step in enumerate(along(view, state), start=1):
        sizes.append(size(finite(step.output)))
        tangents, stretch = orthonormal(transported(step, tangents))
        of_step = {
            "stretch": stretch,
            "tangent_share": shares(tangents[:, 0], kinds),
            "state_growth": sizes[t] / sizes[t - 1],
        }
        if t in at:
            of_step |= _of_step(step, start, probe, kinds, leading, iterations)
        for statistic, values in of_step.items():
            found.setdefault(statistic, []).append(values)
        if t <= horizon:
            steps.append(step)
    worst = largest_singular(Chain(steps), start, leading, iterations)
    stacked = {statistic: torch.stack(values, dim=1) for statistic, values in found.items()}
    elapsed = torch.arange(1, len(sizes), dtype=packed.dtype, device=packed.device)[:, None]
    exponents = stacked.pop("stretch").cumsum(1) / elapsed
    growth = stacked["state_growth"].log().cumsum(1)[..., None] / elapsed
    ftle = worst.values.log()[:, None] / horizon
    return stacked | {
        "exponent": exponents,
        "exponent_relative": exponents - growth,
        "ftle": ftle,
        "ftle_relative": ftle - growth[:, horizon - 1 : horizon],
        "ftle_residual": worst.residuals[:, None],
    }


def _of_step(
    step: Operator,
    start: Tensor,
    probe: Tensor,
    kinds: Sequence[slice],
    leading: int,
    iterations: int,
) -> dict[str, Tensor]:
    singular = largest_singular(step, start, leading, iterations)
    radius = spectral_radius(step, start, 2 * iterations)
    return {
        "singular": singular.values,
        "singular_residual": singular.residuals,
        "input_share": shares(singular.right, kinds),
        "output_share": shares(singular.left, kinds),
        "radius": radius.radius,
        "radius_residual": radius.residual,
        "rotates": radius.rotates.double(),
        "gain": gains(step, probe[:, None], kinds),
    }


def size(states: Tensor) -> Tensor:
    """Norms ``(B,)`` of states ``(B, N, D)``, all tokens as one vector."""
    return states.flatten(1).norm(dim=1)


def finite(states: Tensor) -> Tensor:
    """The states, or a `UserError` if one is not finite."""
    if not states.isfinite().all():
        raise UserError("activations hold NaN or infinite values")
    return states


# ---- per-image linear algebra ------------------------------------------------------------------------


def _without(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The part of ``(B, n)`` orthogonal to an orthonormal basis ``(B, m, n)``, and the coordinates
    ``(B, m)`` of the other; taken twice against rounding (Kahan's "twice is enough"; Parlett,
    1980)."""
    total = vector.new_zeros(basis.shape[:2])
    for _ in range(2):
        coordinates = torch.einsum("bmn,bn->bm", basis, vector)
        vector, total = vector - torch.einsum("bm,bmn->bn", coordinates, basis), total + coordinates
    return vector, total


def _unit(vector: Tensor, scale: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The vector ``(B, n)`` at length 1, and its length ``(B,)``; both 0 where that is only
    rounding of `scale`."""
    length = vector.norm(dim=1)
    there = length > 1e-12 * torch.as_tensor(scale)
    return vector * torch.where(there, 1 / length, 0.0)[:, None], torch.where(there, length, 0.0)
