"""One training run from step to step: data, model, loss and schedule around a `Run`, scores and
checkpoints.

Everything a run has become lies in `state.pt`, written whole or not at all; everything it will draw
is a function of (seed, epoch, image), so a run killed at any moment and started again ends with the
very same weights. Recipe: section 3.3 of the paper (arXiv 2605.10661); optimiser, schedule and EMA
are torch's and timm's.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from timm.layers import PatchDropout
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError, choices
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.models import checkpoint, cost
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import FILE as MASKS
from bvit_interp.models.masks import Masks, masked
from bvit_interp.training.loop import build, card, feed
from bvit_interp.training.loop.distill import objective
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.scoring import test_images
from bvit_interp.training.loop.state import STATE, Run
from bvit_interp.training.loop.stepper import GivenPatchDropout, Stepper
from bvit_interp.training.loop.throughput import (
    fuses,
    peak_flops,
    peak_memory,
    precision,
    utilisation,
)

COLUMNS = {
    "epoch": "passes done, from 1",
    "loss": "mean training loss of the epoch, nats",
    "top1": "share of test images classified right by the raw weights, 0..1",
    "top5": "the same among the five likeliest classes, 0..1",
    "test_loss": "mean test cross-entropy of the raw weights, nats",
    "chance": "share of the most frequent test class: top1 without looking, 0..1",
    "ema_top1": "top1 of the averaged weights, 0..1",
    "ema_top5": "top5 of the averaged weights, 0..1",
    "ema_loss": "test cross-entropy of the averaged weights, nats",
    "lr": "learning rate at the end of the epoch",
    "grad_norm": "mean norm of the gradient before clipping",
    "images_per_second": "training throughput of all processes; beside other runs, this one's share",
    "mfu": "model FLOPs utilisation of a process's device, share of its measured peak, 0..1",
    "memory": "most memory held by the first process, GB",
}
HISTORY = "history.csv"
WRITTEN = (STATE, HISTORY, checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.CONFIG, checkpoint.CARD)
_COMPILERS = ("g++", "clang++", "c++")
_UNDER_MASKS = """- Trained and scored under `masks.safetensors`, a mask for every step: open `{folder}@masked`.
  Without them, also as `{folder}@ema`, the weights make another network.
"""
_CHECKED_EVERY = 10  # steps between two looks at the losses; a state is saved after one of them
_LOOK = 10.0  # seconds between two looks on a GPU at least: each waits for it


class Trainer:
    """A recipe made ready to run: data, model, loss and schedule around a `Run`."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: str,
        save_minutes: float,
        masks: Masks | None = None,
    ) -> None:
        self.recipe, self.out, self.device, self.save_minutes = recipe, out, device, save_minutes
        self.masks, self.under = masks, None if masks is None else masks.fingerprint()
        self.rank, self.world = results.rank_and_world()
        self.first = self.rank == 0
        for left in out.glob(f".{STATE}.*.partial") if self.first else ():
            left.unlink(missing_ok=True)  # by a process killed while it wrote
        self.samples = open_samples(recipe.data, "train")
        self.data = feed.fingerprint(self.samples)
        model = build.make_model(recipe, self.samples).to(device)
        self.steps = feed.images_per_epoch(recipe, self.samples) // recipe.batch_size
        self.total = recipe.epochs * self.steps
        self._check(model)
        self.test = test_images(self.samples, model, recipe, device)
        cost.flops(
            model, count_attention=True
        )  # what the history needs must be known before an epoch is spent
        self.scored = (
            copy.deepcopy(model).requires_grad_(False).eval()
        )  # neither compiled nor its attention changed
        decay, warmup = (
            build.ema_decay(recipe, self.total),
            round(recipe.warmup_epochs * self.steps),
        )
        ema = ModelEmaV3(model, decay=decay, update_after_step=warmup)
        self.run = Run(
            model, ema, build.optimizer(model, recipe), precision=precision(recipe.autocast, device)
        )
        peak_flops(device, self._dtype())  # measured while nothing else runs
        self.schedule = build.schedule(self.run.optimizer, recipe, self.steps)
        self.objective = objective(recipe, model, device)
        self.feed = feed.Feed(recipe, self.samples, model, device)  # late: it may read all images
        if self.test.fits:
            self.test.read()  # an image that cannot be read must be known before an epoch is spent
        self.pending: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # losses and norms not yet looked at
        self.began = self.last_saved = time.monotonic()

    def epoch(self, bar: tqdm) -> Iterator[None]:
        """Train to the end of the current epoch, yielding after every step; score, and write the
        checkpoint."""
        run, recipe = self.run, self.recipe
        number, first = divmod(run.done, self.steps)
        self.forward.train()
        self._drop(recipe.patch_drop(number))
        self.began = looked = time.monotonic()
        pending = self.pending
        for images, targets in self.feed.epoch(number, first):
            self.schedule.step_update(run.done)
            self.schedule.step(number)
            pending.append(self._step(images, targets, number))
            run.done += 1
            bar.update()
            at_end = run.done % self.steps == 0
            alone = (
                self.world == 1
            )  # several processes look at the same steps, whatever their clocks say
            waits = alone and self.device != "cpu" and time.monotonic() - looked < _LOOK
            if at_end or (len(pending) >= _CHECKED_EVERY and not waits):
                self._account(pending, number)
                looked = time.monotonic()
                bar.set_postfix(
                    epoch=f"{number + 1}/{recipe.epochs}",
                    loss=f"{run.loss / (run.done % self.steps or self.steps):.3f}",
                )
            if not at_end:
                if not pending and time.monotonic() - self.last_saved > 60 * self.save_minutes:
                    self._save_between()
                yield
        run.seconds += time.monotonic() - self.began
        self._finish(number)
        yield

    def pause(self) -> None:
        """Save the state between two steps, to go on from."""
        if self.pending:
            self._account(self.pending, self.run.done // self.steps)
        self._save_between()

    def _save_between(self) -> None:
        if self.run.done % self.steps:
            self.run.seconds += time.monotonic() - self.began
        self.save()
        self.began = time.monotonic()

    def clear(self) -> None:
        """Remove what an earlier run left, so that nothing of two runs lies side by side."""
        if self.first:
            for name in (*WRITTEN, MASKS):
                (self.out / name).unlink(missing_ok=True)

    def write(self) -> None:
        """The checkpoint folder as of the last finished epoch, and its history."""
        run, table = self.run, pd.DataFrame(self.run.history)[list(COLUMNS)]
        made = results.provenance({})
        last = {column: value for column, value in run.history[-1].items() if not math.isnan(value)}
        text = card.write(
            self.out, run.model, replace(self.recipe, autocast=run.precision), table, made
        )
        if self.masks is not None:
            text += _UNDER_MASKS.format(folder=self.out)
        checkpoint.save(
            run.model,
            self.out,
            card=text,
            about={"recipe": self.recipe.resume_key(), "precision": run.precision, **last},
            ema=run.ema.module.state_dict(),
        )
        if self.masks is not None:
            self.masks.save(self.out / MASKS, run.model)
        results.write_table(table, self.out / HISTORY)

    def _step(
        self, images: torch.Tensor, targets: torch.Tensor, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; returns this process's loss and the gradient's norm, both still on
        the device."""
        run = self.run
        result = self.step(images, targets, self.recipe.seed, epoch, run.done, self.rank)
        run.average()
        return result

    def _loss(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with self._autocast():  # the teacher too
            return self.objective(self.forward(images), target, images)

    def _drop(self, rate: float) -> None:
        """Leave out this share of the patches from now on."""
        trained = getattr(
            self.forward, "module", self.forward
        )  # under DDP; with masks an unroll of the model
        for drop in (self.run.model.patch_drop, trained.patch_drop):
            if getattr(drop, "prob", 0.0) != rate:
                drop.prob = rate
                self.step.forget()

    def _account(self, pending: list[tuple[torch.Tensor, torch.Tensor]], epoch: int) -> None:
        """Add losses and norms to the epoch's sums; stop if one is not finite.

        Both are those of all processes: all of them stop at the same place, and any can go on from
        the first's state.
        """
        loss_of, norm_of = (torch.stack(column) for column in zip(*pending, strict=True))
        if self.world > 1:
            dist.all_reduce(loss_of)
        losses, norms = (loss_of / self.world).tolist(), norm_of.tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(norm) and math.isfinite(loss)):
                step = self.run.done - len(losses) + i
                raise UserError(
                    f"the loss is {loss} and its gradient's norm {norm} in epoch {epoch + 1}, "
                    f"step {step % self.steps + 1} of {self.steps}; {self.out} holds the last good state"
                )
            self.run.loss += loss
            self.run.norm += norm
        pending.clear()

    def _finish(self, epoch: int) -> None:
        run = self.run
        images = self.steps * self.recipe.batch_size
        per_second = images / run.seconds
        scored = (epoch + 1) % self.recipe.score_every == 0 or run.done == self.total
        row = {
            "epoch": epoch + 1,
            "loss": run.loss / self.steps,
            **(self.score() if scored else {}),
            "lr": run.optimizer.param_groups[0]["lr"],
            "grad_norm": run.norm / self.steps,
            "images_per_second": per_second,
            "memory": peak_memory(self.device),
            "mfu": utilisation(run.model, per_second / self.world, self.device, self._dtype()),
        }
        run.history.append(
            {column: float(row.get(column, math.nan)) for column in COLUMNS} | {"epoch": epoch + 1}
        )
        run.loss = run.norm = run.seconds = 0.0
        if self.first and scored:
            self.write()
        if run.done == self.total or time.monotonic() - self.last_saved > 60 * self.save_minutes:
            self.save()

    def score(self) -> dict[str, float]:
        """Test scores of the raw and the averaged weights, in full precision and one pass over the
        images."""
        self.scored.load_state_dict(self.run.model.state_dict())
        models: dict[str, nn.Module] = {"raw": self.scored, "ema": self.run.ema.module}
        if self.masks is not None:
            models = {name: masked(model, self.masks, baked=True) for name, model in models.items()}
        metrics = {
            name: Classification(model.num_classes).to(self.device)
            for name, model in models.items()
        }
        with torch.inference_mode():
            for images, labels in self.test:
                for name, model in models.items():
                    metrics[name].update(model(images), labels)
        raw, ema = metrics["raw"].compute(), metrics["ema"].compute()
        return {
            "top1": raw["accuracy"],
            "top5": raw["top5_accuracy"],
            "test_loss": raw["loss"],
            "chance": raw["chance"],
            "ema_top1": ema["accuracy"],
            "ema_top5": ema["top5_accuracy"],
            "ema_loss": ema["loss"],
        }

    def save(self) -> None:
        """Write `state.pt`."""
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.run.save(self.out / STATE, self.recipe, self.data, self.under)
        self.last_saved = time.monotonic()

    def _check(self, model: BViT) -> None:
        size, shares = self.recipe.batch_size, self.world * self.recipe.accumulate
        if size % shares:
            raise UserError(
                f"recipe: batch_size {size} is not divisible by {shares} (processes x accumulate)"
            )
        if self.recipe.compile and self.device == "cpu" and not any(map(shutil.which, _COMPILERS)):
            raise UserError(
                f"recipe: compile needs a C++ compiler ({choices(_COMPILERS)}); set compile=false"
            )
        if not self.steps:
            raise UserError(
                f"recipe: an epoch of {len(self.samples)} images is less than a batch of {size}"
            )
        if self.masks is not None:
            masked(
                model, self.masks
            )  # masks that do not fit are refused before anything is written

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.run.precision == "off" else torch.bfloat16

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.run.precision != "off"
        )

    @cached_property
    def step(self) -> Stepper:
        """An optimiser step on images and targets."""
        noisy = [
            module for module in self.forward.modules() if isinstance(module, GivenPatchDropout)
        ]
        unshared = (
            self.forward.no_sync
            if isinstance(self.forward, DistributedDataParallel)
            else nullcontext
        )
        return Stepper(
            self.recipe,
            self.run.model,
            self.run.optimizer,
            self._loss,
            unshared,
            self._captures(),
            noisy,
        )

    def _captures(self) -> bool:
        """Whether steps are captured in a CUDA graph: not what several processes share, nor what is
        recomputed."""
        on_gpu = torch.device(self.device).type == "cuda"
        return on_gpu and self.world == 1 and not self.recipe.grad_checkpointing

    @cached_property
    def forward(self) -> nn.Module:
        """The model as it is trained, made once its precision is known.

        It is masked, its blocks are compiled, activations recomputed, gradients shared, as asked.
        Masked blocks are not compiled: each step's is another one, and the twelve would be compiled
        one by one.
        """
        model = self.run.model
        trained = model if self.masks is None else masked(model, self.masks)
        blocks = list(trained.blocks.children())
        trained.set_grad_checkpointing(self.recipe.grad_checkpointing)
        tokens = model.num_prefix_tokens + round(
            model.patch_embed.num_patches * (1 - self.recipe.patch_drop(0))
        )
        attention = blocks[0].attn
        share = self.recipe.batch_size // self.world // self.recipe.accumulate
        shape = (share, attention.num_heads, tokens, attention.head_dim)
        for block in blocks:
            block.attn.fused_attn = fuses(self.device, self.run.precision, shape)
        if self._captures() and isinstance(trained.patch_drop, PatchDropout):
            trained.patch_drop = GivenPatchDropout(
                trained.patch_drop, trained.patch_embed.num_patches
            )
        if self.recipe.compile and self.masks is None:
            # blocks of one shape share what is compiled, also those of several runs; each shape
            # counts
            torch._dynamo.config.recompile_limit = 64
            for block in blocks:
                block.compile(dynamic=False)
        if self.world == 1:
            return trained
        on = None if self.device == "cpu" else [torch.device(self.device)]
        return DistributedDataParallel(
            trained, device_ids=on, static_graph=self.recipe.accumulate == 1
        )
