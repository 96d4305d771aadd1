"""One optimiser step, captured in a CUDA graph on a GPU.

A replayed step takes almost no time on the host, which would otherwise slow down small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from jaxtyping import Float, Shaped
from timm.layers import PatchDropout
from torch import Tensor, nn

from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe

_EAGER = 3  # steps before the captured one: kernels are chosen, memory and moments are allocated
Loss = Callable[[Tensor, Tensor], Tensor]
"""Images and targets -> mean loss."""


class NoisePatchDropout(PatchDropout):
    """timm's `PatchDropout` with noise that is drawn before the forward pass.

    A captured step cannot draw its own noise: all CUDA graphs of a process share one address for
    the seed, so that runs side by side would use each other's.

    Parameters
    ----------
    replaced : the module whose place it takes.
    patches : number of patches per image.
    """

    def __init__(self, replaced: PatchDropout, patches: int) -> None:
        super().__init__(replaced.prob, replaced.num_prefix_tokens, replaced.ordered)
        self.patches, self.used = patches, 0
        self.noise: Tensor | None = None

    def draw(self, images: Tensor, generator: torch.Generator) -> None:
        """Draw noise for a batch, at the same address as that of the last batch."""
        if self.noise is None or len(self.noise) != len(images):
            self.noise = torch.empty(len(images), self.patches, device=images.device)
        self.noise.normal_(generator=generator)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch kept width"]:
        """Keep each image's patches of the smallest noise; parts of a batch come one by one."""
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
    """Forward and backward pass, clipping and AdamW.

    On one GPU the fourth step is captured with all its kernels, at fixed addresses; later steps
    replay it. Inputs that change between steps are copied in: images, targets, the learning rate,
    and the noise that chooses which patches to leave out. On a CPU, or with several processes,
    every step is computed eagerly.

    Parameters
    ----------
    recipe : its `accumulate` and `clip` are used.
    model : its parameters are trained.
    optimizer : its groups must be `capturable` if steps are captured.
    loss : loss of a part of a batch.
    no_sync : a context in which processes do not share gradients, used for all parts but the last.
    captures : whether steps are captured.
    dropouts : modules whose noise is drawn before every step.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
        captures: bool = False,
        dropouts: Sequence[NoisePatchDropout] = (),
    ) -> None:
        self.recipe, self.model, self.optimizer, self.loss = recipe, model, optimizer, loss
        self.no_sync, self.captures, self.dropouts = no_sync, captures, dropouts
        self._generator: torch.Generator | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the captured step: another one is captured after the model's shapes change."""
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._result: tuple[Tensor, Tensor] | None = None
        self._rates: list[Tensor] = []

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        targets: Shaped[Tensor, "batch ..."],
        *key: int,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """One step.

        Parameters
        ----------
        key : whole numbers that determine the random numbers of the model itself.

        Returns
        -------
        The loss, and the norm of the gradient before clipping; both on the device.
        """
        if self.dropouts:
            seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
            self._generator = self._generator or torch.Generator(images.device)
            self._generator.manual_seed(seed)
            for module in self.dropouts:
                module.draw(images, self._generator)
        if self.captures and self._eager_steps >= _EAGER:
            return self._replay(images, targets)
        self._eager_steps += 1
        with seeded(*key):
            return self._compute(images, targets)

    def _compute(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        number = self.recipe.accumulate
        parts = list(zip(images.chunk(number), targets.chunk(number), strict=True))
        total = torch.zeros((), device=images.device)
        for i, (pixels, target) in enumerate(parts):
            with nullcontext() if i + 1 == len(parts) else self.no_sync():
                loss = self.loss(pixels, target) / len(parts)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm.detach()

    def _replay(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            self._capture(images, targets)
        assert self._graph is not None and self._inputs is not None and self._result is not None
        for fixed, given in zip(self._inputs, (images, targets), strict=True):
            fixed.copy_(given, non_blocking=True)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()
        loss, norm = self._result
        return loss.clone(), norm.clone()

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        self._inputs = images.clone(), targets.clone()
        groups = self.optimizer.param_groups
        self._rates = [torch.full((), group["lr"], device=images.device) for group in groups]
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate  # the graph reads it at its address
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # thread_local: the thread that pins batches in memory may continue meanwhile
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = self._compute(*self._inputs)
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
