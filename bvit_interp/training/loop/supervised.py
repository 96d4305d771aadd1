"""Supervised training of one recipe or several: folders, resuming, time limits."""

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
from bvit_interp.training.loop.trainer import COLUMNS, WRITTEN, Trainer

_LONGEST_TITLE = 40  # characters of a progress bar


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
    """Train a recipe's model, or continue the run in `out`, and leave a checkpoint folder there.

    Parameters
    ----------
    recipe : what to train, on what data, and how.
    out : the folder. It gets `model.safetensors`, `ema.safetensors`, `config.json`, `README.md`,
        `history.csv` with the columns `trainer.COLUMNS`, and `state.pt` to continue from; with
        `masks` also `masks.safetensors`, for `FOLDER@masked`.
    device : device of this process.
    overwrite : start again instead of continuing a run in `out`.
    tensorboard : also log the history for TensorBoard, in `out`.
    save_minutes : time between two states.
    masks : one mask per step (`models.masks`), active in training and in all scores. Blocks are
        then not compiled.
    minutes : stop after this time, between two steps, with a state to continue from; by default
        train to the end.

    Returns
    -------
    The model with its raw weights, in eval mode and without its masks, as the checkpoint opens.

    Raises
    ------
    UserError
        For a recipe that does not fit its data, a folder with other files or the state of another
        recipe, a loss that is not finite, or too little GPU memory.
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
    """Train several recipes side by side, one step of each in turn.

    On a GPU each run has its own stream. Small models leave most of a GPU idle, so the steps of
    several runs overlap there. Runs on the same images share them in memory. Each run gives what it
    would give alone.

    Parameters
    ----------
    plans : recipe and folder of each run. The other parameters are those of `train`.
    """
    folders = [out.resolve() for _, out in plans]
    if repeated := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise UserError(
            f"two runs in one folder: {choices(repeated)}; give recipe files of different names"
        )
    runs = [
        _RunInFolder(recipe, out, device, overwrite, tensorboard, save_minutes, masks)
        for recipe, out in plans
    ]
    for run in runs:  # nothing is written or removed until every run could be made
        run.begin(overwrite)
    # the time it takes to read the images does not count
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    names = ", ".join(out.name for _, out in plans)
    with tqdm(
        total=sum(run.trainer.total for run in runs),
        initial=sum(run.trainer.run.done for run in runs),
        desc=names if len(names) < _LONGEST_TITLE else f"{len(runs)} runs",
        unit="step",
        disable=not runs[0].trainer.is_first,
    ) as bar:
        active = [(run, run.steps(bar)) for run in runs]
        while active:
            if _is_late(deadline, runs[0].trainer.world):
                for run, _ in active:
                    run.trainer.pause()
                break
            active = [(run, steps) for run, steps in active if run.advance(steps)]
    return [run.finished() for run in runs]


def _is_late(deadline: float, world: int) -> bool:
    """Whether the time is up, by the first process's clock."""
    if math.isinf(deadline):
        return False
    late = [time.monotonic() > deadline]
    if world > 1:
        dist.broadcast_object_list(late)
    return late[0]


class _RunInFolder:
    """A run in its folder: new or resumed, then advanced one step at a time."""

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
        existing = [name for name in (*WRITTEN, MASKS) if (out / name).exists()]
        if existing and STATE not in existing and not overwrite:
            raise UserError(
                f"{out} holds {choices(existing)} and no run to continue: give another --out or"
                " --overwrite"
            )
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        with torch.cuda.stream(self.stream):
            self.trainer = trainer = Trainer(recipe, out, device, save_minutes, masks)
            if STATE in existing and not overwrite:
                trainer.run.resume(
                    out / STATE,
                    recipe,
                    trainer.data_fingerprint,
                    trainer.masks_fingerprint,
                    tuple(COLUMNS),
                    trainer.total,
                )
        self.writer = _tensorboard(out) if tensorboard and trainer.is_first else None

    def begin(self, overwrite: bool) -> None:
        """Take over the folder: remove the files of an earlier run, and save a first state."""
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
        """The model as it is now; the files of a finished run are written if one is missing."""
        trainer, out = self.trainer, self.trainer.out
        is_done = trainer.run.done == trainer.total
        written = (*WRITTEN, *([MASKS] if trainer.masks else ()))
        if trainer.is_first and is_done and not all((out / name).exists() for name in written):
            trainer.write()
        if trainer.world > 1:
            dist.barrier()  # the other processes may read what the first one wrote
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
