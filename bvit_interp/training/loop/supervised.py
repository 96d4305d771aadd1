"""Supervised training of one recipe, or of several side by side: folders, resuming, time limits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.errors import MissingExtra, UserError, choices
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import FILE as MASKS
from bvit_interp.models.masks import Masks
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.state import STATE
from bvit_interp.training.loop.trainer import WRITTEN, Trainer


def train(
    recipe: Recipe,
    out: Path,
    device: str = "cpu",
    *,
    overwrite: bool = False,
    tensorboard: bool = False,
    save_minutes: float = 2.0,
    masks: Masks | None = None,
    minutes: float | None = None,
) -> BViT:
    """Train the recipe's model, or go on where a run in `out` stopped, and leave a checkpoint
    folder there.

    Parameters
    ----------
    recipe : what to train, on what and how.
    out : the folder: `model.safetensors`, `ema.safetensors`, `config.json`, `README.md`,
        `history.csv` with `COLUMNS`, and `state.pt` to resume from; with `masks` also
        `masks.safetensors`, for `FOLDER@masked`.
    device : of this process.
    overwrite : start again where a run in `out` would be resumed.
    tensorboard : log the history's columns for TensorBoard too, in `out`.
    save_minutes : time between two states.
    masks : one for every step (`models.masks`), active in training and in all scores; blocks are
        then not compiled.
    minutes : stop after so many, between two steps, with a state to go on from; by default train to
        the end.

    Returns
    -------
    The model with its raw weights, in eval mode, as the checkpoint opens; without its masks.

    Raises
    ------
    UserError
        A recipe that does not fit its data, a folder with other things or the state of another
        recipe, a loss that is not finite, too little GPU memory.
    """
    (model,) = train_all(
        [(recipe, out)],
        device,
        overwrite=overwrite,
        tensorboard=tensorboard,
        save_minutes=save_minutes,
        masks=masks,
        minutes=minutes,
    )
    return model


def train_all(
    plans: Sequence[tuple[Recipe, Path]],
    device: str = "cpu",
    *,
    overwrite: bool = False,
    tensorboard: bool = False,
    save_minutes: float = 2.0,
    masks: Masks | None = None,
    minutes: float | None = None,
) -> list[BViT]:
    """Train several recipes side by side, a step of each in turn; on a GPU each has a stream of its
    own.

    Small models leave most of a GPU idle: the steps of several overlap there. Runs on the same
    images share them. Each run is what it would be alone.

    Parameters
    ----------
    plans : recipe and folder of each run; the rest as in `train`.
    """
    folders = [out.resolve() for _, out in plans]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise UserError(
            f"two runs in one folder: {choices(twice)}; give recipe files of different names"
        )
    runs = [
        _Running(recipe, out, device, overwrite, tensorboard, save_minutes, masks)
        for recipe, out in plans
    ]
    for run in runs:  # all of them are made, so nothing is touched where one cannot be
        run.begin(overwrite)
    until = (
        math.inf if minutes is None else time.monotonic() + 60 * minutes
    )  # reading the images does not count
    first, names = runs[0].trainer.first, ", ".join(out.name for _, out in plans)
    with tqdm(
        total=sum(run.trainer.total for run in runs),
        initial=sum(run.trainer.run.done for run in runs),
        desc=names if len(names) < 40 else f"{len(runs)} runs",
        unit="step",
        disable=not first,
    ) as bar:
        going = [(run, run.steps(bar)) for run in runs]
        while going:
            if _late(until, runs[0].trainer.world):
                for run, _ in going:
                    run.trainer.pause()
                break
            going = [(run, steps) for run, steps in going if run.advance(steps)]
    return [run.finished() for run in runs]


def _late(until: float, world: int) -> bool:
    """Whether the time is up, by the first process's clock."""
    if math.isinf(until):
        return False
    late = [time.monotonic() > until]
    if world > 1:
        dist.broadcast_object_list(late)
    return late[0]


class _Running:
    """A run in its folder: made ready or resumed, then advanced a step at a time."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: str,
        overwrite: bool,
        tensorboard: bool,
        save_minutes: float,
        masks: Masks | None,
    ) -> None:
        results.check_folder(out)
        there = [name for name in (*WRITTEN, MASKS) if (out / name).exists()]
        if there and STATE not in there and not overwrite:
            raise UserError(
                f"{out} holds {choices(there)} and no run to go on with: give another --out or --overwrite"
            )
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        with torch.cuda.stream(self.stream):
            self.trainer = trainer = Trainer(recipe, out, device, save_minutes, masks)
            if STATE in there and not overwrite:
                trainer.run.resume(out / STATE, recipe, trainer.data, trainer.under)
        self.writer = _tensorboard(out) if tensorboard and trainer.first else None

    def begin(self, overwrite: bool) -> None:
        """Make the folder this run's."""
        if overwrite:
            self.trainer.clear()
        if not self.trainer.run.done:
            with torch.cuda.stream(self.stream):
                self.trainer.save()

    def steps(self, bar: tqdm) -> Iterator[None]:
        """Train to the end; yields after every step."""
        trainer = self.trainer
        while trainer.run.done < trainer.total:
            yield from trainer.epoch(bar)
            if self.writer is not None:
                for name, value in trainer.run.history[-1].items():
                    self.writer.add_scalar(name, value, trainer.run.history[-1]["epoch"])
                self.writer.flush()

    def advance(self, steps: Iterator[None]) -> bool:
        """Take the next step; False at the end."""
        try:
            with torch.cuda.stream(self.stream):
                return next(steps, self) is not self
        except torch.OutOfMemoryError:
            raise UserError(
                "out of GPU memory: set accumulate=2 (or more), or grad_checkpointing=true"
            ) from None

    def finished(self) -> BViT:
        """The model as it is now, with what a folder holds at the end of a run."""
        trainer, out = self.trainer, self.trainer.out
        done = trainer.run.done == trainer.total
        written = (*WRITTEN, *([MASKS] if trainer.masks else ()))
        if trainer.first and done and not all((out / name).exists() for name in written):
            trainer.write()
        if trainer.world > 1:
            dist.barrier()  # what the first process wrote is there for all
        if self.stream is not None:
            self.stream.synchronize()
        trainer.scored.load_state_dict(trainer.run.model.state_dict())
        return trainer.scored.requires_grad_()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard") from None
    return SummaryWriter(str(folder))
