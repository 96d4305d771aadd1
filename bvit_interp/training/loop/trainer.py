"""One training run from step to step: data, model, loss, schedule, scores.

The state of a run is in `state.pt`, which is written completely or not at all. All random draws
depend on (seed, epoch, image) alone. A run that is killed at any moment and started again
therefore ends with the very same weights. The recipe is that of section 3.3 of the paper (arXiv
2605.10661); the optimiser, the schedule and the averaging are torch's and timm's.
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
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError, choices
from bvit_interp.models import checkpoint, cost
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import FILE as MASKS
from bvit_interp.models.masks import Masks, masked
from bvit_interp.training.loop import build, card, feed
from bvit_interp.training.loop.distill import objective
from bvit_interp.training.loop.prepare import prepare
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.scoring import score, scoring_images
from bvit_interp.training.loop.state import STATE, Run
from bvit_interp.training.loop.stepper import NoisePatchDropout, Stepper
from bvit_interp.training.loop.throughput import peak_flops, peak_memory, precision, utilisation

COLUMNS = {
    "epoch": "number of finished epochs, from 1",
    "loss": "mean training loss of the epoch, nats",
    "top1": "share of test images that the raw weights classify correctly, 0..1",
    "top5": "share of test images whose class is among the five most likely, raw weights, 0..1",
    "test_loss": "mean test cross-entropy of the raw weights, nats",
    "chance": "share of the most frequent test class: the null of top1, 0..1",
    "ema_top1": "top1 of the averaged weights, 0..1",
    "ema_top5": "top5 of the averaged weights, 0..1",
    "ema_loss": "mean test cross-entropy of the averaged weights, nats",
    "lr": "learning rate at the end of the epoch",
    "grad_norm": "mean norm of the gradient before clipping",
    "images_per_second": "training throughput of all processes; runs side by side share it",
    "mfu": "model FLOPs utilisation: share of the measured peak of a process's device, 0..1",
    "memory": "most memory that the first process used, GB",
}
HISTORY = "history.csv"
WRITTEN = (STATE, HISTORY, checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.CONFIG, checkpoint.CARD)
_COMPILERS = ("g++", "clang++", "c++")
_CARD_OF_MASKS = """- Trained and scored under `masks.safetensors`, one mask per step: open
  `{folder}@masked`. Without the masks, also as `{folder}@ema`, it is another network.
"""
_CHECKED_EVERY = 10  # steps between two checks of the losses; a state is saved only after one
_SECONDS_BETWEEN_CHECKS = 10.0  # at least, on a GPU, which each check waits for


class Trainer:
    """A recipe that is ready to run: data, model, loss and schedule around a `Run`.

    Parameters
    ----------
    recipe : what to train, and how.
    out : folder of the checkpoint and of the state.
    device : device of this process.
    save_minutes : time between two states.
    masks : one mask per step, active in training and in scores.

    Attributes
    ----------
    run : the state of the run.
    steps, total : optimiser steps per epoch, and of the whole run.
    data_fingerprint, masks_fingerprint : what a saved state must agree with.
    is_first : whether this is the first process, which writes the files.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: str,
        save_minutes: float,
        masks: Masks | None = None,
    ) -> None:
        self.recipe, self.out, self.device, self.save_minutes = recipe, out, device, save_minutes
        self.masks = masks
        self.masks_fingerprint = None if masks is None else masks.fingerprint()
        self.rank, self.world = results.rank_and_world()
        self.is_first = self.rank == 0
        if self.is_first:
            for partial in out.glob(f".{STATE}.*.partial"):  # of a process killed while writing
                partial.unlink(missing_ok=True)
        self.samples = open_samples(recipe.data, "train")
        self.data_fingerprint = feed.fingerprint(self.samples)
        model = build.make_model(recipe, self.samples).to(device)
        self.steps = feed.images_per_epoch(recipe, self.samples) // recipe.batch_size
        self.total = recipe.epochs * self.steps
        self._check(model)
        self.scored_on = scoring_images(self.samples, model, recipe, device)
        cost.flops(model, count_attention=True)  # an error must come before an epoch is trained
        self.run = self._new_run(model)
        peak_flops(device, self._dtype())  # measured while nothing else runs
        self.schedule = build.schedule(self.run.optimizer, recipe, self.steps)
        self.objective = objective(recipe, model, device)
        self.feed = feed.Feed(recipe, self.samples, model, device)  # late: it may read all images
        if self.scored_on.fits:
            self.scored_on.read()  # so that an unreadable image is found before training
        self.unchecked: list[tuple[Tensor, Tensor]] = []  # losses and norms, on the device
        self.began = self.last_saved = time.monotonic()

    def _new_run(self, model: BViT) -> Run:
        # a copy that is not compiled and keeps its attention
        self.scored = copy.deepcopy(model).requires_grad_(False).eval()
        ema = ModelEmaV3(
            model,
            decay=build.ema_decay(self.recipe, self.total),
            update_after_step=round(self.recipe.warmup_epochs * self.steps),
        )
        return Run(
            model,
            ema,
            build.optimizer(model, self.recipe),
            precision=precision(self.recipe.autocast, self.device),
        )

    def _check(self, model: BViT) -> None:
        size, parts = self.recipe.batch_size, self.world * self.recipe.accumulate
        if size % parts:
            raise UserError(
                f"recipe: batch_size {size} is not divisible by {parts} (processes x accumulate)"
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
            masked(model, self.masks)  # refuses masks that do not fit before anything is written

    def epoch(self, bar: tqdm) -> Iterator[None]:
        """Train to the end of the current epoch and write the checkpoint; yields after every step.

        Parameters
        ----------
        bar : progress bar of steps.
        """
        run = self.run
        number, first = divmod(run.done, self.steps)
        self.forward.train()
        self._set_patch_drop(self.recipe.patch_drop(number))
        self.began = checked = time.monotonic()
        for images, targets in self.feed.epoch(number, first):
            self.schedule.step_update(run.done)
            self.schedule.step(number)
            self.unchecked.append(self._step(images, targets, number))
            run.done += 1
            bar.update()
            at_end = run.done % self.steps == 0
            if at_end or (len(self.unchecked) >= _CHECKED_EVERY and self._may_check(checked)):
                self._check_losses(number)
                checked = time.monotonic()
                bar.set_postfix(
                    epoch=f"{number + 1}/{self.recipe.epochs}",
                    loss=f"{run.loss / (run.done % self.steps or self.steps):.3f}",
                )
            if not at_end:
                if not self.unchecked and self._is_save_due():
                    self._save_within_epoch()
                yield
        run.seconds += time.monotonic() - self.began
        self._finish(number)
        yield

    def _may_check(self, checked: float) -> bool:
        """Whether to wait for the losses, after a last check at time `checked`.

        Several processes must check after the same steps, whatever their clocks say.
        """
        if self.world > 1 or self.device == "cpu":
            return True
        return time.monotonic() - checked >= _SECONDS_BETWEEN_CHECKS

    def _is_save_due(self) -> bool:
        return time.monotonic() - self.last_saved > 60 * self.save_minutes

    def pause(self) -> None:
        """Save the state between two steps, so that the run can be continued."""
        if self.unchecked:
            self._check_losses(self.run.done // self.steps)
        self._save_within_epoch()

    def _save_within_epoch(self) -> None:
        if self.run.done % self.steps:
            self.run.seconds += time.monotonic() - self.began
        self.save()
        self.began = time.monotonic()

    def _step(self, images: Tensor, targets: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """One optimiser step: this process's loss and the norm of the gradient, on the device."""
        run = self.run
        result = self.step(images, targets, self.recipe.seed, epoch, run.done, self.rank)
        run.average()
        return result

    def _loss(self, images: Tensor, target: Tensor) -> Tensor:
        with self._autocast():  # the teacher uses it too
            return self.objective(self.forward(images), target, images)

    def _set_patch_drop(self, rate: float) -> None:
        """Leave out this share of the patches from now on."""
        # DDP wraps the model; with masks, the trained model is an unroll of the run's
        trained: Any = getattr(self.forward, "module", self.forward)
        model: Any = self.run.model
        for dropout in (model.patch_drop, trained.patch_drop):
            if getattr(dropout, "prob", 0.0) != rate:
                dropout.prob = rate
                self.step.reset()

    def _check_losses(self, epoch: int) -> None:
        """Add the latest losses and norms to the epoch's sums; stop if one is not finite.

        Both are means over all processes. All of them therefore stop at the same step, and any
        process can continue from the state that the first one wrote.
        """
        loss_sums, all_norms = (torch.stack(column) for column in zip(*self.unchecked, strict=True))
        if self.world > 1:
            dist.all_reduce(loss_sums)
        losses, norms = (loss_sums / self.world).tolist(), all_norms.tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(norm) and math.isfinite(loss)):
                step = (self.run.done - len(losses) + i) % self.steps
                raise UserError(
                    f"the loss is {loss} and its gradient's norm {norm} in epoch {epoch + 1},"
                    f" step {step + 1} of {self.steps}; {self.out} holds the last good state"
                )
            self.run.loss += loss
            self.run.norm += norm
        self.unchecked.clear()

    def _finish(self, epoch: int) -> None:
        """Score the epoch if it is due, add a row to the history, and write the files."""
        run = self.run
        per_second = self.steps * self.recipe.batch_size / run.seconds
        is_last = run.done == self.total
        is_scored = (epoch + 1) % self.recipe.score_every == 0 or is_last
        row = {
            "loss": run.loss / self.steps,
            **(self.score() if is_scored else {}),
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
        if self.is_first and is_scored:
            self.write()
        if is_last or self._is_save_due():
            self.save()

    def score(self) -> dict[str, float]:
        """Test scores of the raw and the averaged weights, in full precision."""
        self.scored.load_state_dict(self.run.model.state_dict())
        models: dict[str, VisionTransformer] = {"raw": self.scored, "ema": self.run.ema.module}
        if self.masks is not None:
            models = {name: masked(model, self.masks, baked=True) for name, model in models.items()}
        scores = score(models, self.scored_on)
        raw, averaged = scores["raw"], scores["ema"]
        return {
            "top1": raw["accuracy"],
            "top5": raw["top5_accuracy"],
            "test_loss": raw["loss"],
            "chance": raw["chance"],
            "ema_top1": averaged["accuracy"],
            "ema_top5": averaged["top5_accuracy"],
            "ema_loss": averaged["loss"],
        }

    def save(self) -> None:
        """Write `state.pt`."""
        if self.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.run.save(
                self.out / STATE, self.recipe, self.data_fingerprint, self.masks_fingerprint
            )
        self.last_saved = time.monotonic()

    def write(self) -> None:
        """Write the checkpoint folder of the last finished epoch, and the history."""
        run, table = self.run, pd.DataFrame(self.run.history)[list(COLUMNS)]
        recipe = replace(self.recipe, autocast=run.precision)
        text = card.write(self.out, run.model, recipe, table, results.provenance({}))
        if self.masks is not None:
            text += _CARD_OF_MASKS.format(folder=self.out)
        last = {column: value for column, value in run.history[-1].items() if not math.isnan(value)}
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

    def clear(self) -> None:
        """Remove the files of an earlier run, so that those of two runs are never mixed."""
        if self.is_first:
            for name in (*WRITTEN, MASKS):
                (self.out / name).unlink(missing_ok=True)

    @cached_property
    def forward(self) -> nn.Module:
        """The model as it is trained; made late, because a resumed run sets the precision."""
        return prepare(
            self.run.model,
            self.recipe,
            self.masks,
            self.device,
            self.run.precision,
            self.world,
            self._captures(),
        )

    @cached_property
    def step(self) -> Stepper:
        """An optimiser step on images and targets."""
        dropouts = [
            module for module in self.forward.modules() if isinstance(module, NoisePatchDropout)
        ]
        forward: Any = self.forward
        is_distributed = isinstance(forward, DistributedDataParallel)
        return Stepper(
            self.recipe,
            self.run.model,
            self.run.optimizer,
            self._loss,
            forward.no_sync if is_distributed else nullcontext,
            self._captures(),
            dropouts,
        )

    def _captures(self) -> bool:
        """Whether to capture steps in a CUDA graph: not with several processes or recomputation."""
        on_gpu = torch.device(self.device).type == "cuda"
        return on_gpu and self.world == 1 and not self.recipe.grad_checkpointing

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.run.precision == "off" else torch.bfloat16

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.run.precision != "off"
        )
