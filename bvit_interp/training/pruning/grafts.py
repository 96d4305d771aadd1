"""Grafts: for every step a fresh copy of the block, trained alone within a frozen model, to tell
what the step needs.

The inner loop of the pruning of appendix G.3 (arXiv 2605.10661): graft t starts from the first
weights under the masks of step t and learns what is asked of step t while the trained model does
all others. The T grafts do not see each other, so they are one computation: the model runs once up
to every step, and what the grafts make of it goes through the later steps together, as one batch
that grows by a graft a step: T (T - 1) / 2 frozen steps for what T runs one after the other need T
(T - 1) for. Biases and norms of a graft learn too; embeddings, head and a time embedding are the
frozen model's (our reading).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.samples import Samples, first_line
from bvit_interp.errors import UserError
from bvit_interp.models import stepping
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import PLACES, Masks, put_on
from bvit_interp.models.unroll import unroll
from bvit_interp.training.loop import build as start
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.distill import objective
from bvit_interp.training.loop.draws import drawn_for
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.throughput import precision

COLUMNS = {
    "epoch": "passes done, from 1",
    "step": "the step that the graft replaces, from 1",
    "loss": "mean training loss of the epoch with this graft in place, nats",
}


class Grafts(nn.ModuleList):
    """Graft t - 1: the block of `init` under mask t, with Parameters of its own.

    Parameters
    ----------
    init : the model before its first step.
    main : the frozen, masked, trained model (an unroll), whose time embedding they share.
    masks : of the steps.
    """

    def __init__(self, init: BViT, main: VisionTransformer, masks: Masks) -> None:
        blocks = [copy.deepcopy(block) for block in unroll(init).blocks]
        for t, (block, frozen) in enumerate(zip(blocks, main.blocks, strict=True)):
            if getattr(frozen, "step_embed", None) is not None:
                block.step_embed = frozen.step_embed
            put_on(block, masks, t)
        super().__init__(blocks)

    def no_weight_decay(self) -> set[str]:
        """As a model's: no tensor beside norms and biases is free of weight decay."""
        return set()

    def weights(self) -> dict[str, Tensor]:
        """The matrices of all grafts, component -> ``(T, *shape)``, with what their masks hide."""
        return {
            name: torch.stack(
                [
                    g.get_submodule(place).parametrizations.weight.original.detach().cpu()
                    for g in self
                ]
            )
            for name, place in PLACES.items()
        }


def answers(
    main: VisionTransformer, grafts: nn.ModuleList, images: Tensor, *, recompute: bool = False
) -> Tensor:
    """Logits ``(T, B, classes)``: in row t step t is graft t, the other steps are those of `main`.

    Parameters
    ----------
    main : an unroll with frozen parameters.
    grafts : a block for every step.
    images : ``(B, C, H, W)``, normalised.
    recompute : hold no activation of the main model's steps for the backward pass.
    """
    with torch.no_grad():
        path = [stepping.embed(main, images)]
        for _ in range(len(grafts) - 1):
            path.append(stepping.advance(main, path[-1]))
    tokens = path[0].tokens[:0]
    for state, graft, block in zip(path, grafts, main.blocks, strict=True):
        if len(tokens):  # what the grafts so far have made of it
            tokens = recomputed(block, tokens, use_reentrant=False) if recompute else block(tokens)
        tokens = torch.cat([tokens, graft(state.tokens)])
    return main.forward_head(main.norm(tokens)).unflatten(0, (len(grafts), len(images)))


def train(
    recipe: Recipe,
    epochs: int,
    init: BViT,
    main: VisionTransformer,
    masks: Masks,
    samples: Samples,
    state: Path,
    device: str = "cpu",
    *,
    save_minutes: float = 2.0,
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Train the grafts of all steps, or go on where this stopped.

    Parameters
    ----------
    recipe : that of the trained model: its optimiser, augmentation and, over `epochs`, its
        schedule.
    epochs : passes over the training images, G.
    init, main, masks : as in `Grafts`; `main` is frozen here.
    samples : the training images; the epochs drawn are those after the recipe's own.
    state : file to resume from, for the caller to remove.
    device : of this process; under torchrun every process takes its share of each batch.
    save_minutes : time between two states.

    Returns
    -------
    The trained matrices, component -> ``(T, *shape)``, and a table of `COLUMNS`.

    Raises
    ------
    UserError
        The state of other grafts, a loss that is not finite, too little GPU memory.
    """
    training = _Training(recipe, epochs, init, main, masks, samples, state, device)
    training.resume()
    saved = time.monotonic()
    with tqdm(
        total=training.total,
        initial=training.done,
        desc=f"{state.parent.name} grafts",
        unit="step",
        disable=not training.first,
        leave=False,
    ) as bar:
        while training.done < training.total:
            try:
                for _ in training.steps_of_epoch():
                    bar.update()
                    at_end = training.done % training.steps == 0
                    if (
                        not at_end
                        and time.monotonic() - saved > 60 * save_minutes
                        and training.finite()
                    ):
                        training.save()
                        saved = time.monotonic()
            except torch.OutOfMemoryError:
                raise UserError(
                    "out of GPU memory: set accumulate=2 (or more), or grad_checkpointing=true"
                ) from None
            training.close_epoch()
            training.save()
    return training.grafts.weights(), pd.DataFrame(training.history, columns=list(COLUMNS))


class _Training:
    """The grafts with their optimiser, and how far they are."""

    def __init__(
        self,
        recipe: Recipe,
        epochs: int,
        init: BViT,
        main: VisionTransformer,
        masks: Masks,
        samples: Samples,
        state: Path,
        device: str,
    ) -> None:
        self.recipe, self.samples, self.state, self.device = (
            shortened(recipe, epochs),
            samples,
            state,
            device,
        )
        self.offset = recipe.epochs
        if hasattr(main.patch_drop, "prob"):
            main.patch_drop.prob = recipe.patch_drop(self.offset)
        self.rank, self.world = results.rank_and_world()
        self.first = self.rank == 0
        self.identity = {
            "recipe": recipe.resume_key(),
            "epochs": epochs,
            "masks": masks.fingerprint(),
            "main": results.weights_hash(main),
            "init": results.weights_hash(init),
            "data": feed.fingerprint(samples),
        }
        self.main = (
            main.requires_grad_(False).to(device).train()
        )  # patches are left out as the recipe says
        self.grafts = Grafts(init, self.main, masks).to(device).train()
        self.precision = precision(recipe.autocast, device)
        self._choose_attention()
        self.feed = feed.Feed(self.recipe, samples, init, device)
        self.optimizer = start.optimizer(self.grafts, self.recipe)  # type: ignore[arg-type]
        self.steps = feed.images_per_epoch(recipe, samples) // recipe.batch_size
        self.total, self.done = epochs * self.steps, 0
        self.schedule = start.schedule(self.optimizer, self.recipe, self.steps)
        self.objective = objective(recipe, init, device)
        self.losses = torch.zeros(
            len(self.grafts), device=device
        )  # sums over the steps of the epoch
        self.history: list[dict[str, float]] = []

    def _choose_attention(self) -> None:
        """As the trainer: the fused kernel's bf16 backward is slow on a CPU."""
        for block in (*self.grafts, *self.main.blocks):
            block.attn.fused_attn = not (self.device == "cpu" and self.precision != "off")

    def steps_of_epoch(self) -> Iterator[None]:
        """Take the steps that are left of the current epoch; yields after each."""
        number, first = divmod(self.done, self.steps)
        for images, targets in self.feed.epoch(self.offset + number, first):
            self.schedule.step_update(self.done)
            self.schedule.step(number)
            self._step(images, targets, self.offset + number)
            self.done += 1
            yield

    def _step(self, images: Tensor, targets: Tensor, epoch: int) -> None:
        recipe = self.recipe
        parts = list(
            zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True)
        )
        with drawn_for(recipe.seed, epoch, self.done, self.rank, 1):
            for pixels, target in parts:
                losses = self._losses(pixels, target) / len(parts)
                losses.sum().backward()  # no graft is in another's loss
                self.losses += losses.detach()
        if self.world > 1:
            for parameter in self._trained():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(self.world)
        norms = [
            nn.utils.clip_grad_norm_(graft.parameters(), recipe.clip or math.inf)
            for graft in self.grafts
        ]
        self.losses += 0 * torch.stack(norms)  # NaN from here on if a gradient is not finite
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _losses(self, images: Tensor, target: Tensor) -> Tensor:
        """The loss of each graft ``(T,)``."""
        on = self.precision != "off"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=on):
            logits = answers(
                self.main, self.grafts, images, recompute=self.recipe.grad_checkpointing
            )
            return torch.stack([self.objective(own, target, images) for own in logits])

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.grafts.parameters() if parameter.requires_grad]

    def finite(self) -> bool:
        """Whether all losses and gradients of the epoch were, so far."""
        return bool(self.losses.isfinite().all())

    def close_epoch(self) -> None:
        """Note the mean losses of the epoch; stop if one is not finite."""
        if self.world > 1:
            dist.all_reduce(self.losses)
        means = (self.losses / self.world / self.steps).tolist()
        epoch = self.done // self.steps
        for step, loss in enumerate(means, start=1):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss with the graft of step {step}, or its gradient, is {loss} in epoch {epoch}; "
                    f"{self.state.parent} holds the last good state"
                )
            self.history.append({"epoch": epoch, "step": step, "loss": loss})
        self.losses.zero_()

    def save(self) -> None:
        """Write the state, whole or not at all."""
        if not self.first:
            return
        content = {
            "grafts": self.grafts.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "losses": self.losses,
            "history": self.history,
            "identity": self.identity,
            "precision": self.precision,
        }
        try:
            with results.replacing(self.state) as temporary:
                torch.save(content, temporary)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
            raise UserError(
                f"{self.state}: the state cannot be written ({first_line(error)})"
            ) from error

    def resume(self) -> None:
        """Take up the state, if there is one; that of other grafts is refused."""
        for left in self.state.parent.glob(f".{self.state.name}.*.partial") if self.first else ():
            left.unlink(missing_ok=True)  # by a process killed while it wrote
        if not self.state.is_file():
            return
        try:
            content = torch.load(self.state, map_location="cpu", weights_only=True)
            differing = [
                key for key, value in self.identity.items() if content["identity"].get(key) != value
            ]
        except (
            Exception
        ) as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... as the damage is
            raise UserError(
                f"{self.state}: not the whole state of grafts ({first_line(error)}); remove it"
            ) from error
        if differing:
            raise UserError(
                f"{self.state} is of other grafts (other {', '.join(differing)}); --overwrite starts again"
            )
        self.grafts.load_state_dict(content["grafts"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.losses.copy_(content["losses"])
        self.done, self.history, self.precision = (
            content["done"],
            content["history"],
            content["precision"],
        )
        self._choose_attention()


def shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe over so many epochs: the same share of warm-up, images as hard as at its end."""
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    if recipe.schedule == "epoch":
        warmup = float(int(warmup))
    return replace(recipe, epochs=epochs, warmup_epochs=warmup, easy_epochs=0.0, fade_epochs=0.0)


def check(model: BViT) -> None:
    """Refuse models that have no grafts: more blocks than one, a memory, a distillation token."""
    stored = list(model.blocks.children())
    memory, distilled = hasattr(stored[0], "memory"), hasattr(model, "head_dist")
    if len(stored) > 1 or memory or distilled:
        own = (
            "a memory"
            if memory
            else "a distillation token"
            if distilled
            else f"{len(stored)} blocks"
        )
        raise UserError(
            f"recipe: masks of steps are learned for a bViT of one block without a memory, this has {own}"
        )
