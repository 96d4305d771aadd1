"""One optimiser step; on a GPU captured once in a CUDA graph and replayed, so that the host never
holds it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

from bvit_interp.training.loop.draws import drawn_for
from bvit_interp.training.loop.recipe import Recipe

_EAGER = 3  # steps taken before one is captured: kernels are chosen, memory and moments allocated
Loss = Callable[[Tensor, Tensor], Tensor]
"""Images and targets -> mean loss."""


class GivenPatchDropout(PatchDropout):
    """timm's `PatchDropout` on noise that is drawn before the forward pass, for steps that are
    captured.

    A captured step would draw by a seed at an address that all graphs of a process share, so runs
    side by side would take each other's.

    Parameters
    ----------
    like : the module that this one takes the place of.
    patches : number of patches of an image.
    """

    def __init__(self, like: PatchDropout, patches: int) -> None:
        super().__init__(like.prob, like.num_prefix_tokens, like.ordered)
        self.patches, self.used = patches, 0
        self.noise: Tensor | None = None

    def draw(self, images: Tensor, generator: torch.Generator) -> None:
        """New noise for a batch, at the address of the last."""
        if self.noise is None or len(self.noise) != len(images):
            self.noise = torch.empty(len(images), self.patches, device=images.device)
        self.noise.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Keep each image's patches of the smallest noise, ``(b, tokens, D)``; the parts of a batch
        come in turn."""
        if not self.training or not self.prob:
            return x
        assert self.noise is not None
        noise = self.noise[self.used : self.used + len(x)]
        self.used = (self.used + len(x)) % len(self.noise)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = noise.argsort(1)[:, : max(1, int(patches.shape[1] * (1 - self.prob)))]
        if self.ordered:
            kept = kept.sort(1)[0]
        return torch.cat([prefix, patches.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))], 1)


class Stepper:
    """Forward, backward, clipping and AdamW.

    On one GPU the fourth step is captured with all its kernels, at fixed addresses; later ones are
    replays. What changes between steps comes in from outside: images, targets, the learning rate
    and the noise by which patches are left out. Several processes and CPUs take every step one call
    at a time.

    Parameters
    ----------
    recipe : accumulate and clip.
    model : whose parameters are trained.
    optimizer : with `capturable` groups where steps are captured.
    loss : of a part of a batch.
    unshared : a context in which gradients are not yet shared among processes, for all parts but
        the last.
    captures : whether steps are captured.
    noisy : modules whose noise is drawn before every step.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        unshared: Callable = nullcontext,
        captures: bool = False,
        noisy: Sequence[GivenPatchDropout] = (),
    ) -> None:
        self.recipe, self.model, self.optimizer, self.loss = recipe, model, optimizer, loss
        self.unshared, self.captures = unshared, captures
        self.noisy = noisy
        self._generator: torch.Generator | None = None
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
        if self.noisy:
            seed = int(
                np.random.SeedSequence(drawn).generate_state(1, np.uint64)[0] >> np.uint64(1)
            )
            self._generator = self._generator or torch.Generator(images.device)
            self._generator.manual_seed(seed)
            for module in self.noisy:
                module.draw(images, self._generator)
        if self.captures and self._taken >= _EAGER:
            return self._replayed(images, targets)
        self._taken += 1
        with drawn_for(*drawn):
            return self._taken_once(images, targets)

    def _taken_once(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        parts = list(
            zip(
                images.chunk(self.recipe.accumulate),
                targets.chunk(self.recipe.accumulate),
                strict=True,
            )
        )
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

    def _replayed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            self._capture(images, targets)
        assert self._graph is not None and self._given is not None and self._result is not None
        for own, given in zip(self._given, (images, targets), strict=True):
            own.copy_(given, non_blocking=True)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
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
        stream = torch.cuda.current_stream()
        # thread_local: the thread that pins a feed's batches may go on meanwhile
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = self._taken_once(*self._given)
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
