"""Supervised training: AdamW, warm-up and cosine, EMA, one or many processes, and a run that survives being killed.

Everything a run has become lies in `state.pt`, written whole or not at all; everything it will draw is a function of
(seed, epoch, image), so a run killed at any moment and started again ends with the very same weights. Recipe:
section 3.3 of the paper (arXiv 2605.10661); optimiser, schedule, Mixup and EMA are torch's and timm's.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Loader
from bvit_interp.errors import MissingExtra, UserError, choices
from bvit_interp.models import checkpoint, cost
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import FILE as MASKS
from bvit_interp.models.masks import Masks, masked
from bvit_interp.probes.scores import Classification
from bvit_interp.training import card, feed, start
from bvit_interp.training.augment import drawn_for, mixing, training_view
from bvit_interp.training.distill import objective
from bvit_interp.training.recipe import Recipe
from bvit_interp.training.run import STATE, Run
from bvit_interp.training.throughput import peak_memory, utilisation

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
    "images_per_second": "training throughput of all processes",
    "mfu": "model FLOPs utilisation of a process's device, share of its measured peak, 0..1",
    "memory": "most memory held by the first process, GB",
}
HISTORY = "history.csv"
_WRITTEN = (STATE, HISTORY, checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.CONFIG, checkpoint.CARD)
_COMPILERS = ("g++", "clang++", "c++")
_UNDER_MASKS = """- Trained and scored under `masks.safetensors`, a mask for every step: open `{folder}@masked`.
  Without them, also as `{folder}@ema`, the weights make another network.
"""
_CHECKED_EVERY = 50  # steps between two looks at the losses: each waits for the GPU


def train(
    recipe: Recipe, out: Path, device: str = "cpu", *, overwrite: bool = False, tensorboard: bool = False,
    save_minutes: float = 2.0, masks: Masks | None = None,
) -> BViT:  # fmt: skip
    """Train the recipe's model, or go on where a run in `out` stopped, and leave a checkpoint folder there.

    Parameters
    ----------
    recipe : what to train, on what and how.
    out : the folder: `model.safetensors`, `ema.safetensors`, `config.json`, `README.md`, `history.csv` with `COLUMNS`,
        and `state.pt` to resume from; with `masks` also `masks.safetensors`, for `FOLDER@masked`.
    device : of this process.
    overwrite : start again where a run in `out` would be resumed.
    tensorboard : log the history's columns for TensorBoard too, in `out`.
    save_minutes : time between two states within an epoch.
    masks : one for every step (`models.masks`), active in training and in all scores; blocks are then not compiled.

    Returns
    -------
    The model with its raw weights, in eval mode, as the checkpoint opens; without its masks.

    Raises
    ------
    UserError
        A recipe that does not fit its data, a folder with other things or the state of another recipe, a loss that is
        not finite, too little GPU memory.
    """
    results.check_folder(out)
    there = [name for name in (*_WRITTEN, MASKS) if (out / name).exists()]
    if there and STATE not in there and not overwrite:
        raise UserError(f"{out} holds {choices(there)} and no run to go on with: give another --out or --overwrite")
    trainer = Trainer(recipe, out, device, save_minutes, masks)
    if overwrite:
        trainer.clear()
    elif STATE in there:
        trainer.run.resume(out / STATE, recipe, trainer.data, trainer.under)
    if not trainer.run.done:
        trainer.save()  # from here on the folder is this run's
    writer = _tensorboard(out) if tensorboard and trainer.first else None
    with tqdm(
        total=trainer.total, initial=trainer.run.done, desc=out.name, unit="step", disable=not trainer.first
    ) as bar:
        while trainer.run.done < trainer.total:
            try:
                trainer.epoch(bar)
            except torch.OutOfMemoryError:
                raise UserError("out of GPU memory: set accumulate=2 (or more), or grad_checkpointing=true") from None
            if writer is not None:
                for name, value in trainer.run.history[-1].items():
                    writer.add_scalar(name, value, trainer.run.history[-1]["epoch"])
                writer.flush()
    if trainer.first and not all((out / name).exists() for name in (*_WRITTEN, *([MASKS] if masks else ()))):
        trainer.write()
    if trainer.world > 1:
        dist.barrier()  # what the first process wrote is there for all
    trainer.scored.load_state_dict(trainer.run.model.state_dict())
    return trainer.scored.requires_grad_()


class Trainer:
    """A recipe made ready to run: data, model, loss and schedule around a `Run`."""

    def __init__(self, recipe: Recipe, out: Path, device: str, save_minutes: float, masks: Masks | None = None) -> None:
        self.recipe, self.out, self.device, self.save_minutes = recipe, out, device, save_minutes
        self.masks, self.under = masks, None if masks is None else masks.fingerprint()
        self.rank, self.world = results.rank_and_world()
        self.first = self.rank == 0
        for left in out.glob(f".{STATE}.*.partial") if self.first else ():
            left.unlink(missing_ok=True)  # by a process killed while it wrote
        self.samples = open_samples(recipe.data, "train")
        self.data = feed.fingerprint(self.samples)
        model = start.make_model(recipe, self.samples).to(device)
        self.view, self.mixup = training_view(recipe, model), mixing(recipe, model.num_classes)
        self.steps = feed.images_per_epoch(recipe, self.samples) // recipe.batch_size
        self.total = recipe.epochs * self.steps
        self._check()
        cost.flops(model, count_attention=True)  # what the history needs must be known before an epoch is spent
        self.scored = copy.deepcopy(model).requires_grad_(False).eval()  # neither compiled nor its attention changed
        decay, warmup = start.ema_decay(recipe, self.total), round(recipe.warmup_epochs * self.steps)
        ema = ModelEmaV3(model, decay=decay, update_after_step=warmup)
        self.run = Run(model, ema, start.optimizer(model, recipe))
        self.schedule = start.schedule(self.run.optimizer, recipe, self.steps)
        self.objective = objective(recipe, model, device)
        self.test = self._test_loader(model)
        self.forward = self._forward(model)

    def epoch(self, bar: tqdm) -> None:
        """Train to the end of the current epoch, score, and write the checkpoint."""
        run, recipe = self.run, self.recipe
        number, first = divmod(run.done, self.steps)
        self.forward.train()
        source = feed.Epoch(recipe, self.samples, self.view, number)
        began = saved = time.monotonic()
        pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        for images, labels in feed.batches(source, first, recipe.workers, pin=self.device != "cpu"):
            self.schedule.step_update(run.done)
            self.schedule.step(number)
            pending.append(self._step(images, labels, number))
            run.done += 1
            bar.update()
            at_end = run.done % self.steps == 0
            if at_end or len(pending) == _CHECKED_EVERY:
                self._account(pending, number)
                bar.set_postfix(
                    epoch=f"{number + 1}/{recipe.epochs}",
                    loss=f"{run.loss / (run.done % self.steps or self.steps):.3f}",
                )
            if not at_end and not pending and time.monotonic() - saved > 60 * self.save_minutes:
                run.seconds += time.monotonic() - began
                self.save()
                began = saved = time.monotonic()
        run.seconds += time.monotonic() - began
        self._finish(number)

    def clear(self) -> None:
        """Remove what an earlier run left, so that nothing of two runs lies side by side."""
        if self.first:
            for name in (*_WRITTEN, MASKS):
                (self.out / name).unlink(missing_ok=True)

    def write(self) -> None:
        """The checkpoint folder as of the last finished epoch, and its history."""
        run, table = self.run, pd.DataFrame(self.run.history)[list(COLUMNS)]
        made = results.provenance({})
        last = {column: value for column, value in run.history[-1].items() if not math.isnan(value)}
        text = card.write(self.out, run.model, self.recipe, table, made)
        if self.masks is not None:
            text += _UNDER_MASKS.format(folder=self.out)
        checkpoint.save(
            run.model, self.out, card=text, about={"recipe": self.recipe.identity(), **last},
            ema=run.ema.module.state_dict(),
        )  # fmt: skip
        if self.masks is not None:
            self.masks.save(self.out / MASKS, run.model)
        results.write_table(table, self.out / HISTORY)

    def _step(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; returns this process's loss and the gradient's norm, both still on the device."""
        run, recipe = self.run, self.recipe
        images = images.to(self.device, non_blocking=True)
        targets = labels.to(self.device, non_blocking=True)
        parts = list(zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
        total = torch.zeros((), device=self.device)
        with drawn_for(recipe.seed, epoch, run.done, self.rank, 1):  # the last: not what an image draws
            for i, (pixels, target) in enumerate(parts):
                shared = i + 1 == len(parts) or self.world == 1
                with nullcontext() if shared else self.forward.no_sync():
                    loss = self._loss(pixels, target) / len(parts)
                    loss.backward()
                total += loss.detach()
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.ema.update(run.model, step=run.done + 1)
        return total, norm.detach()

    def _loss(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        with self._autocast():  # the teacher too
            return self.objective(self.forward(images), target, images)

    def _account(self, pending: list[tuple[torch.Tensor, torch.Tensor]], epoch: int) -> None:
        """Add losses and norms to the epoch's sums; stop if one is not finite.

        Both are those of all processes: all of them stop at the same place, and any can go on from the first's state.
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
            "epoch": epoch + 1, "loss": run.loss / self.steps, **(self.score() if scored else {}),
            "lr": run.optimizer.param_groups[0]["lr"], "grad_norm": run.norm / self.steps,
            "images_per_second": per_second, "memory": peak_memory(self.device),
            "mfu": utilisation(run.model, per_second / self.world, self.device, self._dtype()),
        }  # fmt: skip
        run.history.append({column: float(row.get(column, math.nan)) for column in COLUMNS} | {"epoch": epoch + 1})
        run.loss = run.norm = run.seconds = 0.0
        if self.first and scored:
            self.write()
        self.save()

    def score(self) -> dict[str, float]:
        """Test scores of the raw and the averaged weights, in full precision and one pass over the images."""
        self.scored.load_state_dict(self.run.model.state_dict())
        models: dict[str, nn.Module] = {"raw": self.scored, "ema": self.run.ema.module}
        if self.masks is not None:
            models = {name: masked(model, self.masks, baked=True) for name, model in models.items()}
        metrics = {name: Classification(model.num_classes).to(self.device) for name, model in models.items()}
        with torch.inference_mode():
            for batch in self.test:
                images, labels = batch.images.to(self.device), self.places[batch.labels].to(self.device)
                for name, model in models.items():
                    metrics[name].update(model(images), labels)
        raw, ema = metrics["raw"].compute(), metrics["ema"].compute()
        return {
            "top1": raw["top1"], "top5": raw["top5"], "test_loss": raw["loss"], "chance": raw["chance"],
            "ema_top1": ema["top1"], "ema_top5": ema["top5"], "ema_loss": ema["loss"],
        }  # fmt: skip

    def save(self) -> None:
        """Write `state.pt`."""
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.run.save(self.out / STATE, self.recipe, self.data, self.under)

    def _check(self) -> None:
        size, shares = self.recipe.batch_size, self.world * self.recipe.accumulate
        if size % shares:
            raise UserError(f"recipe: batch_size {size} is not divisible by {shares} (processes x accumulate)")
        if self.mixup is not None and size // shares % 2:
            raise UserError(f"recipe: Mixup needs an even number of images, got parts of {size // shares}")
        if self.recipe.compile and self.device == "cpu" and not any(map(shutil.which, _COMPILERS)):
            raise UserError(f"recipe: compile needs a C++ compiler ({choices(_COMPILERS)}); set compile=false")
        if not self.steps:
            raise UserError(f"recipe: an epoch of {len(self.samples)} images is less than a batch of {size}")

    def _test_loader(self, model: BViT) -> Loader:
        samples = open_samples(self.recipe.data)
        place, own = ([getattr(kind, name, None) for name in ("root", "split")] for kind in (samples, self.samples))
        if place == own:
            raise UserError(f"recipe: {self.recipe.data} has nothing to score on beside its training images")
        self.places = label_map(samples, model)
        return Loader(samples, [Geometry.of(model, samples)], batch_size=250, workers=self.recipe.workers)

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.recipe.autocast == "off" else torch.bfloat16

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.autocast != "off")

    def _forward(self, model: BViT) -> nn.Module:
        """The model as it is trained: masked, blocks compiled, activations recomputed, gradients shared, as asked.

        Masked blocks are not compiled: each step's is another one, and the twelve would be compiled one by one.
        """
        trained = model if self.masks is None else masked(model, self.masks)
        blocks = list(trained.blocks.children())
        trained.set_grad_checkpointing(self.recipe.grad_checkpointing)
        if self.device == "cpu" and self.recipe.autocast != "off":
            for block in blocks:  # the fused kernel's bf16 backward is several times slower on a CPU
                block.attn.fused_attn = False
        if self.recipe.compile and self.masks is None:
            for block in blocks:
                block.compile()
        if self.world == 1:
            return trained
        on = None if self.device == "cpu" else [torch.device(self.device)]
        return DistributedDataParallel(trained, device_ids=on, static_graph=self.recipe.accumulate == 1)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard") from None
    return SummaryWriter(str(folder))
