"""The training of grafts, which can be resumed.

All grafts are trained at once, with one optimiser and one schedule: that of the trained model's
recipe over the graft epochs. `grafts.py` has the computation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError, first_line
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import Masks
from bvit_interp.training.loop import build, feed, saved_parts
from bvit_interp.training.loop.distill import objective
from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.throughput import precision
from bvit_interp.training.pruning.grafts import Grafts, graft_logits

COLUMNS = {
    "epoch": "number of the epoch, from 1",
    "step": "step that the graft replaces, from 1",
    "loss": "mean training loss of the epoch with this graft in place, nats",
}


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
) -> tuple[dict[str, Float[Tensor, "steps ..."]], pd.DataFrame]:
    """Train the grafts of all steps, or continue a training that was stopped.

    Parameters
    ----------
    recipe : recipe of the trained model. The grafts have its optimiser, its augmentation and, over
        `epochs`, its schedule.
    epochs : passes over the training images, G.
    init, main, masks : as in `Grafts`; `main` is frozen here.
    samples : the training images. Their epochs are numbered after those of the recipe.
    state : file to resume from. The caller removes it.
    device : device of this process; under torchrun every process takes its share of each batch.
    save_minutes : minutes between two saved states.

    Returns
    -------
    The trained matrices, component -> ``(T, *shape)``, and a table of `COLUMNS`.

    Raises
    ------
    UserError
        For the state of other grafts, a loss that is not finite, or too little GPU memory.
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
    """The grafts with their optimiser, and the steps done so far."""

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
        self.recipe = shortened_recipe(recipe, epochs)
        self.samples = samples
        self.state = state
        self.device = device
        self.offset = recipe.epochs
        if hasattr(main.patch_drop, "prob"):
            main.patch_drop.prob = recipe.patch_drop(self.offset)
        self.rank, self.world = results.rank_and_world()
        self.first = self.rank == 0
        self.resume_key = {
            "recipe": recipe.resume_key(),
            "epochs": epochs,
            "masks": masks.fingerprint(),
            "main": results.weights_hash(main),
            "init": results.weights_hash(init),
            "data": feed.fingerprint(samples),
        }
        # in training mode, so that patches are left out as the recipe says
        self.main = main.requires_grad_(False).to(device).train()
        self.grafts = Grafts(init, self.main, masks).to(device).train()
        self.precision = precision(recipe.autocast, device)
        self._choose_attention()
        self.feed = feed.Feed(self.recipe, samples, init, device)
        self.optimizer = build.optimizer(self.grafts, self.recipe)  # type: ignore[arg-type]
        self.steps = feed.images_per_epoch(recipe, samples) // recipe.batch_size
        self.total, self.done = epochs * self.steps, 0
        self.schedule = build.schedule(self.optimizer, self.recipe, self.steps)
        self.objective = objective(recipe, init, device)
        # sums over the steps of the epoch
        self.losses = torch.zeros(len(self.grafts), device=device)
        self.history: list[dict[str, float]] = []

    def _choose_attention(self) -> None:
        """Use no fused attention in bf16 on a CPU, where its backward pass is slow."""
        for block in (*self.grafts, *self.main.blocks):
            block.attn.fused_attn = not (self.device == "cpu" and self.precision != "off")

    def steps_of_epoch(self) -> Iterator[None]:
        """Take the remaining steps of the current epoch; yields after each."""
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
        with seeded(recipe.seed, epoch, self.done, self.rank, 1):
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
            logits = graft_logits(
                self.main, self.grafts, images, recompute=self.recipe.grad_checkpointing
            )
            return torch.stack([self.objective(row, target, images) for row in logits])

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.grafts.parameters() if parameter.requires_grad]

    def finite(self) -> bool:
        """Whether all losses and gradients of the epoch are finite so far."""
        return bool(self.losses.isfinite().all())

    def close_epoch(self) -> None:
        """Record the mean losses of the epoch; stop if one is not finite."""
        if self.world > 1:
            dist.all_reduce(self.losses)
        means = (self.losses / self.world / self.steps).tolist()
        epoch = self.done // self.steps
        for step, loss in enumerate(means, start=1):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss with the graft of step {step}, or its gradient, is {loss} in epoch"
                    f" {epoch}; {self.state.parent} holds the last good state"
                )
            self.history.append({"epoch": epoch, "step": step, "loss": loss})
        self.losses.zero_()

    def save(self) -> None:
        """Write the state, completely or not at all."""
        if not self.first:
            return
        content = {
            "grafts": self.grafts.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "losses": self.losses,
            "history": self.history,
            "resume_key": self.resume_key,
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
        """Load the state, if there is one; the state of other grafts is refused."""
        for left in self.state.parent.glob(f".{self.state.name}.*.partial") if self.first else ():
            left.unlink(missing_ok=True)  # left by a process killed while writing
        if not self.state.is_file():
            return
        try:
            content = torch.load(self.state, map_location="cpu", weights_only=True)
            # an older state calls it identity
            saved = content["resume_key" if "resume_key" in content else "identity"]
            differing = [key for key, value in self.resume_key.items() if saved.get(key) != value]
        except Exception as error:  # torch raises one of many, depending on the damage
            raise UserError(
                f"{self.state}: not the whole state of grafts ({first_line(error)}); remove it"
            ) from error
        if differing:
            raise UserError(
                f"{self.state} is of other grafts (other {', '.join(differing)});"
                " --overwrite starts again"
            )
        try:
            self.done = saved_parts.whole(content, "done", 0, self.total)
            self.history = saved_parts.rows(content, ("epoch", "step", "loss"))
            self.precision = saved_parts.word(content, "precision", ("bf16", "off"))
            saved_parts.load_tensors({"losses": self.losses}, {"losses": content["losses"]})
            self.grafts.load_state_dict(content["grafts"])
            saved_parts.load_optimizer(self.optimizer, content["optimizer"])
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.state}: not the whole state of grafts ({first_line(error)}); remove it"
            ) from error
        self._choose_attention()


def shortened_recipe(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe over `epochs` epochs: its share of warm-up, and images as hard as at its end."""
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    if recipe.schedule == "epoch":
        warmup = float(int(warmup))
    return replace(recipe, epochs=epochs, warmup_epochs=warmup, easy_epochs=0.0, fade_epochs=0.0)
