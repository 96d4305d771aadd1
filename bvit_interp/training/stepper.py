"""One optimiser step; on a GPU captured once in a CUDA graph and replayed, so that the host never holds it up."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from bvit_interp.training.draws import drawn_for
from bvit_interp.training.recipe import Recipe

_EAGER = 3  # steps taken before one is captured: kernels are chosen, memory and moments allocated
Loss = Callable[[Tensor, Tensor], Tensor]
"""Images and targets -> mean loss."""


class Stepper:
    """Forward, backward, clipping and AdamW.

    On one GPU the fourth step is captured with all its kernels, at fixed addresses; later ones are replays. What
    changes between steps comes in from outside: images, targets, the learning rate and the seed of what the model
    draws (patches left out). Several processes and CPUs take every step one call at a time.

    Parameters
    ----------
    recipe : accumulate and clip.
    model : whose parameters are trained.
    optimizer : with `capturable` groups where steps are captured.
    loss : of a part of a batch.
    unshared : a context in which gradients are not yet shared among processes, for all parts but the last.
    captures : whether steps are captured.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss,
        unshared: Callable = nullcontext, captures: bool = False,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.optimizer, self.loss = recipe, model, optimizer, loss
        self.unshared, self.captures = unshared, captures
        self.forget()

    def forget(self) -> None:
        """Capture anew, after the model has changed its shapes."""
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        self._result: tuple[Tensor, Tensor] | None = None
        self._rates: list[Tensor] = []

    def __call__(self, images: Tensor, targets: Tensor, *drawn: int) -> tuple[Tensor, Tensor]:
        """One step on images ``(b, 3, H, W)`` and their targets.

        Parameters
        ----------
        drawn : what the model's own random numbers are a function of.

        Returns
        -------
        Loss and norm of the gradient before clipping, on the device.
        """
        if self.captures and self._taken >= _EAGER:
            return self._replayed(images, targets, drawn)
        self._taken += 1
        with drawn_for(*drawn):
            return self._taken_once(images, targets)

    def _taken_once(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        parts = list(zip(images.chunk(self.recipe.accumulate), targets.chunk(self.recipe.accumulate), strict=True))
        total = torch.zeros((), device=images.device)
        for i, (pixels, target) in enumerate(parts):
            with nullcontext() if i + 1 == len(parts) else self.unshared():
                loss = self.loss(pixels, target) / len(parts)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm.detach()

    def _replayed(self, images: Tensor, targets: Tensor, drawn: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            self._capture(images, targets)
        assert self._graph is not None and self._given is not None and self._result is not None
        for own, given in zip(self._given, (images, targets), strict=True):
            own.copy_(given, non_blocking=True)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        torch.cuda.manual_seed(int(np.random.SeedSequence(drawn).generate_state(1)[0]))
        self._graph.replay()
        loss, norm = self._result
        return loss.clone(), norm.clone()

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        self._given = images.clone(), targets.clone()
        groups = self.optimizer.param_groups
        self._rates = [torch.full((), group["lr"], device=images.device) for group in groups]
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate  # the graph reads it at its address
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self._result = self._taken_once(*self._given)
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
