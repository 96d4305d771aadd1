"""Runs whose steps come in another order, the step read off a state, and states that no longer tell
their step.

A schedule is the order in which the steps of a tied unroll are applied, each with what is its own:
its row of the time embedding, the refresh of a memory, its block in a hybrid or a stack. Steps that
are one and the same function are recognised, and schedules that begin alike share those steps.

The step is read off a state linearly (Fisher's discriminant, one covariance for all steps). Once
the means of all steps are equal no linear probe beats a constant (Belrose et al., 2023, "LEACE",
arXiv 2306.03819): that is how a state is stripped of its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics import Metric

from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.memory import MemoryBlock
from bvit_interp.models.stepping import State, advance, answer, embed
from bvit_interp.models.unroll import unroll

FEATURES = ("raw", "direction", "norm")
"""What of a state a probe reads: all of it, z / ||z||, or the logarithm of ||z|| alone."""
REMOVALS = ("subspace", "random_subspace", "random_scaled", "mean", "random_shift")
"""Changes of a state: see `removals`."""
Schedule = tuple[int, ...]
"""Steps in the order in which they are applied, from 1."""


class Run(NamedTuple):
    """The name of a schedule."""

    kind: str
    step: int | None = None
    other: int | None = None


def schedules(
    trained: int, runs: Sequence[int] = (), shifts: Sequence[int] = ()
) -> dict[Run, Schedule]:
    """The schedules of a model of T trained steps; "normal" is 1..T.

    Parameters
    ----------
    trained : T.
    runs : numbers of steps S of the runs 1..S.
    shifts : numbers of steps d of `delay` (d + 1..T: the state waits at z_0 while the clock runs),
        `lag` (T steps, the clock d behind, step 1 until it starts) and `lead` (T steps, the clock d
        ahead, step T once it is through); those of T and more are left out.
    """
    whole = tuple(range(1, trained + 1))
    found = {Run("normal"): whole, Run("reverse"): whole[::-1], Run("again"): 2 * whole}
    for t in whole:
        found[Run("skip", t)] = whole[: t - 1] + whole[t:]
        found[Run("repeat", t)] = whole[:t] + whole[t - 1 :]
        found[Run("fixed", t)] = (t,) * trained
    for t in whole[:-1]:
        found[Run("swap", t, t + 1)] = (*whole[: t - 1], t + 1, t, *whole[t + 1 :])
    for d in (d for d in shifts if d < trained):
        found[Run("delay", d)] = whole[d:]
        found[Run("lag", d)] = tuple(max(t - d, 1) for t in whole)
        found[Run("lead", d)] = tuple(min(t + d, trained) for t in whole)
    return found | {Run("run", count): tuple(range(1, count + 1)) for count in runs}


def substitutions(trained: int) -> dict[Run, Schedule]:
    """Step s in the place of step t, for all T x T pairs; s = t is the normal run."""
    whole = tuple(range(1, trained + 1))
    return {Run("put", t, s): (*whole[: t - 1], s, *whole[t:]) for t in whole for s in whole}


def same_steps(view: VisionTransformer) -> list[int]:
    """For every step of an unroll the first step, from 1, that is the same function of state and
    memory.

    The same tensors under the same names, the same row of a time embedding and the same refresh of
    a memory; a step that bears hooks is taken for the same as no other.
    """
    first: dict[tuple[object, ...], int] = {}
    return [first.setdefault(_function(block, i), i + 1) for i, block in enumerate(view.blocks)]


def _function(block: nn.Module, i: int) -> tuple[object, ...]:
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
        return (id(block),)
    tensors = [
        *block.named_parameters(remove_duplicate=False),
        *block.named_buffers(remove_duplicate=False),
    ]
    row = block.step_index if getattr(block, "step_embed", None) is not None else None
    refresh = block.memory.refreshed(i) if isinstance(block, MemoryBlock) else None
    return (*((name, id(tensor)) for name, tensor in tensors), row, refresh)


def with_mean_row(model: VisionTransformer) -> VisionTransformer | None:
    """An unroll whose every step adds the mean of all rows of the time embedding; None for a model
    without one."""
    view = unroll(model)
    table = getattr(view.blocks[0], "step_embed", None)
    if table is None:
        return None
    mean = nn.Parameter(table.detach().mean(0, keepdim=True), requires_grad=False)
    for block in view.blocks:
        block.own_step(mean, 0)
    return view


@dataclass
class _Node:
    """A place that runs reach: the schedules that end there, and the steps that go on."""

    ends: list[int] = field(default_factory=list)
    after: dict[int, _Node] = field(default_factory=dict)


class Plan:
    """Schedules of one unroll, run together.

    Parameters
    ----------
    view : a tied unroll with every step that is named.
    schedules : name -> steps.

    Attributes
    ----------
    runs : the names, in order.
    applied : steps that are computed for all of them together.
    """

    def __init__(self, view: VisionTransformer, schedules: Mapping[Run, Schedule]) -> None:
        self.view, self.runs, self.applied = view, tuple(schedules), 0
        first, self._root = same_steps(view), _Node()
        for place, steps in enumerate(schedules.values()):
            node = self._root
            for step in steps:
                if first[step - 1] not in node.after:
                    node.after[first[step - 1]] = _Node()
                    self.applied += 1
                node = node.after[first[step - 1]]
            node.ends.append(place)

    def logits(self, images: Tensor) -> Tensor:
        """Answers after every schedule, ``(K, B, C)``; the states on one path are alive at a
        time."""
        found: list[Tensor] = [images] * len(self.runs)
        waiting: list[tuple[_Node, State, int | None]] = [
            (self._root, embed(self.view, images), None)
        ]
        while waiting:
            node, state, step = waiting.pop()
            if step is not None:
                state = advance(self.view, State(state.tokens, step - 1, state.memory))
            if node.ends:
                logits = answer(self.view, state)
                for place in node.ends:
                    found[place] = logits
            waiting += [(child, state, step) for step, child in node.after.items()]
        return torch.stack(found)


class Outcomes(MeanCI):
    """What K changed runs answer, beside the normal run of the same images.

    Returns
    -------
    ``compute``: `accuracy`, `change` (accuracy minus the normal run's), `agreement` (share of the
    normal run's answers) and `log_prob` (change of the true class's log-probability, nats), each a
    list of K dicts: `value`, `low`, `high` (95 % over images: Wilson's of shares, normal of
    changes) and `n`; of shares also `null`, the share of the most frequent class among the images,
    and the agreement of independent answers given as often.
    """

    said: Tensor
    usual: Tensor
    truth: Tensor

    def __init__(self, runs: int, classes: int) -> None:
        super().__init__(runs, 4)
        for name, shape in (
            ("said", (runs, classes)),
            ("usual", (classes,)),
            ("truth", (classes,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, normal: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """Add a batch: logits ``(K, B, C)``, those of the normal run ``(B, C)``, labels
        ``(B,)``."""
        both = torch.cat([normal[None], logits])
        if not torch.isfinite(both).all():
            raise UserError("logits hold NaN or infinite values")
        answers = both.argmax(-1)
        hits = (answers == labels).double()
        log_p = (
            both.double()
            .log_softmax(-1)
            .gather(-1, labels.expand(len(both), -1)[..., None])[..., 0]
        )
        same = (answers[1:] == answers[0]).double()
        values = [hits[1:], hits[1:] - hits[0], same, log_p[1:] - log_p[0]]
        super().update(torch.stack(values, dim=-1).transpose(0, 1))
        self.said.scatter_add_(1, answers[1:], torch.ones_like(same))
        self.usual += torch.bincount(answers[0], minlength=len(self.usual))
        self.truth += torch.bincount(labels, minlength=len(self.truth))

    def compute(self) -> dict[str, list[dict[str, float]]]:  # type: ignore[override]
        """All of them over all processes."""
        n = int(self.truth.sum())
        if not n:
            raise UserError("no image was scored")
        found = {key: column.tolist() for key, column in super().compute().items()}
        independent, frequent = (
            (self.said @ self.usual / n**2).tolist(),
            float(self.truth.max()) / n,
        )
        rows: dict[str, list[dict[str, float]]] = {}
        for j, measure in enumerate(("accuracy", "change", "agreement", "log_prob")):
            rows[measure] = [
                {key: column[i][j] for key, column in found.items()} for i in range(len(self.said))
            ]
            for row, agreeing in zip(rows[measure], independent, strict=True):
                if measure in ("accuracy", "agreement"):
                    low, high = wilson_interval(row["value"] * n, n)
                    row |= {
                        "low": low,
                        "high": high,
                        "null": frequent if measure == "accuracy" else agreeing,
                    }
        return rows


# ---- reading the step ------------------------------------------------------------------------------------


def states(view: VisionTransformer, images: Tensor, steps: int) -> Iterator[State]:
    """The states of steps 1..`steps`, one after the other."""
    state = embed(view, images)
    for _ in range(steps):
        state = advance(view, state)
        yield state


def feature(tokens: Tensor, name: str) -> Tensor:
    """What a probe of `FEATURES` reads of states ``(..., D)``: float64 ``(..., D)``, of "norm"
    ``(..., 1)``."""
    tokens = tokens.double()
    norm = tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return {"raw": tokens, "direction": tokens / norm, "norm": norm.log()}[name]


class StepSums:
    """Sums over tokens from which a step is learnt.

    Attributes
    ----------
    gram : X^T X over all tokens and steps ``(D, D)``.
    sums, means : the tokens of each step added up, and their mean, ``(T, D)``.
    count : tokens of each step ``(T,)``.
    """

    def __init__(self, gram: Tensor, sums: Tensor, count: Tensor) -> None:
        self.gram, self.sums, self.count = gram, sums, count
        self.means = sums / count[:, None]


class StepMoments(Metric):
    """`StepSums`, streamed: constant memory, any number of processes."""

    full_state_update = False
    gram: Tensor
    sums: Tensor
    count: Tensor

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        for name, shape in (
            ("gram", (width, width)),
            ("sums", (steps, width)),
            ("count", (steps,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, step: int) -> None:
        """Add the float64 states ``(..., D)`` of tokens at a step."""
        if not torch.isfinite(values).all():
            raise UserError("activations hold NaN or infinite values")
        flat = values.flatten(0, -2)
        self.gram += flat.T @ flat
        self.sums[step - 1] += flat.sum(0)
        self.count[step - 1] += len(flat)

    def compute(self) -> StepSums:
        """The sums over all processes."""
        if not self.count.all():
            raise UserError("no image is left to learn the steps from")
        return StepSums(self.gram, self.sums, self.count)


class Discriminant:
    """Linear discriminant analysis of the step (Fisher, 1936): the steps share one covariance and
    are as frequent.

    Parameters
    ----------
    sums : of the tokens it is fitted to.
    ridge : added to the covariance, as a share of its mean diagonal.
    """

    def __init__(self, sums: StepSums, ridge: float) -> None:
        means, n = sums.means, sums.count.sum()
        within = (sums.gram - sums.sums.T @ means) / n
        least = 1e-12 * sums.gram.diagonal().mean() / n  # where all images are one
        scale = torch.maximum(within.diagonal().mean(), least)
        within += ridge * scale * torch.eye(len(within), dtype=within.dtype, device=within.device)
        self.weight = torch.linalg.solve(within, means.T)
        self.bias = -(self.weight.T * means).sum(1) / 2

    def __call__(self, values: Tensor) -> Tensor:
        """How much float64 states ``(..., D)`` look like each step, ``(..., T)``."""
        return values @ self.weight + self.bias


def judged(scores: Tensor) -> Tensor:
    """How well steps are read, by image, ``(B, T + 1, 3)``, the last over all steps.

    Share of tokens read right; error in steps; share of the other steps that a step is told from by
    forced choice: of two states of a token, which is which. There the biases cancel, so a linear
    probe of states whose steps have equal means is right half of the time, however the steps differ
    in spread.

    Parameters
    ----------
    scores : of a `Discriminant` ``(B, K, T, T)`` of K tokens: states at the steps, then the steps
        they may be of.
    """
    steps = scores.shape[-1]
    error = (scores.argmax(-1) - torch.arange(steps, device=scores.device)).abs().double()
    own = scores.diagonal(dim1=-2, dim2=-1)
    apart = own[..., None] + own[..., None, :] - scores - scores.mT
    told = ((apart > 0).double().sum(-1) - (apart.diagonal(dim1=-2, dim2=-1) > 0).double()) / (
        steps - 1
    )
    of_steps = torch.stack([(error == 0).double(), error, told], dim=-1).mean(1)
    return torch.cat([of_steps, of_steps.mean(1, keepdim=True)], dim=1)


# ---- taking it out ---------------------------------------------------------------------------------------


class Removal:
    """The map ``z -> z - z B^T B + o_t`` of states of step t.

    Parameters
    ----------
    basis : orthonormal directions B ``(R, D)`` that are taken out.
    offset : o_t ``(T, D)``, put in.
    """

    def __init__(self, basis: Tensor, offset: Tensor) -> None:
        self.basis, self.offset = basis, offset

    def delta(self, values: Tensor, step: int) -> Tensor:
        """What is added to float64 states ``(..., D)`` of a step."""
        return self.offset[step - 1] - (values @ self.basis.T) @ self.basis

    def moved(self, sums: StepSums) -> StepSums:
        """The sums after the removal, exactly."""
        kept = (
            torch.eye(self.basis.shape[1], dtype=sums.gram.dtype, device=sums.gram.device)
            - self.basis.T @ self.basis
        )
        left, added = sums.sums @ kept, sums.count[:, None] * self.offset
        cross = left.T @ self.offset
        return StepSums(
            kept @ sums.gram @ kept + cross + cross.T + added.T @ self.offset,
            left + added,
            sums.count,
        )


def removals(sums: StepSums, seed: Sequence[int]) -> dict[str, Removal]:
    """Two that leave all steps the same mean, and their random counterparts.

    `subspace` replaces the component along the span of the differences of the steps' means (at most
    T - 1 dimensions) by its mean over the steps; `mean` takes only the difference of the own step's
    mean from the mean of all out, and leaves what is the image's (for a known step the smallest
    such change). `random_subspace` does the first to as many random directions, `random_shift`
    shifts as far as the second in a random direction.
    """
    means = sums.means
    centre = means.mean(0)
    apart = centre - means
    sizes, directions = torch.linalg.svd(apart, full_matrices=False)[1:]
    basis = directions[sizes > 1e-9 * sizes[0]]
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(seed).generate_state(1)[0])
    )
    gauss = torch.randn(means.shape[1], len(basis) + 1, generator=generator, dtype=means.dtype).to(
        means.device
    )
    random = torch.linalg.qr(gauss[:, :-1]).Q.T
    direction = gauss[:, -1] / gauss[:, -1].norm()
    whole = torch.ones_like(means)
    return {
        "subspace": Removal(basis, whole * (basis @ centre @ basis)),
        "random_subspace": Removal(random, whole * (random @ centre @ random)),
        "mean": Removal(basis[:0], apart),
        "random_shift": Removal(basis[:0], apart.norm(dim=1, keepdim=True) * direction),
    }


def removed(tokens: Tensor, step: int, of: Mapping[str, Removal]) -> dict[str, Tensor]:
    """The states ``(..., D)`` of a step after each of `REMOVALS`.

    `random_scaled` is `random_subspace` stretched so that every token moves as far as under
    `subspace`.
    """
    values = tokens.double()
    delta = {name: removal.delta(values, step) for name, removal in of.items()}
    wanted, found = (
        delta[name].norm(dim=-1, keepdim=True) for name in ("subspace", "random_subspace")
    )
    delta["random_scaled"] = (
        delta["random_subspace"] * wanted / found.clamp_min(torch.finfo(found.dtype).tiny)
    )
    return {name: (values + delta[name]).to(tokens.dtype) for name in REMOVALS}
