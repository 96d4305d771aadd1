"""The state of a training run, in one file.

There is no state of random generators or of a sampler to keep: all random draws depend on the
seed, the epoch and the image alone.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from bvit_interp import results
from bvit_interp.errors import UserError, first_line
from bvit_interp.models.bvit import BViT
from bvit_interp.training.loop import saved_parts
from bvit_interp.training.loop.recipe import Recipe

STATE = "state.pt"
_PROGRESS = ("done", "loss", "norm", "seconds", "history", "precision")
_INCOMPLETE = "not the whole state of a run"


@dataclass
class Run:
    """A training run between two steps: what `state.pt` holds.

    Parameters
    ----------
    model, ema, optimizer : the raw weights, the averaged weights, and AdamW with its moments.
    done : optimiser steps so far.
    loss, norm : sums over the steps of the current epoch.
    seconds : time spent on training in the current epoch.
    history : one row per finished epoch; see `trainer.COLUMNS`.
    precision : bf16 or off; a run continues with the precision it began with.
    lock : the lock of the folder, from the first time that a state is written or read there.
    """

    model: BViT
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    done: int = 0
    loss: float = 0.0
    norm: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    precision: str = "off"
    lock: results.Lock | None = None

    def average(self) -> None:
        """Move the averaged weights towards the raw weights, after a step.

        `ModelEmaV3.update` does the same, but builds two state dicts, which takes longer than a
        step on a GPU.
        """
        decay = self.ema.get_decay(self.done + 1)
        averaged: list[Tensor] = list(self.ema.module.parameters())
        raw: list[Tensor] = list(self.model.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averaged, raw, 1 - decay)

    def save(self, path: Path, recipe: Recipe, data: str, masks: str | None = None) -> None:
        """Write the state.

        Parameters
        ----------
        recipe : the run's recipe.
        data, masks : fingerprints of the run's images, and of its masks if it has any.

        Raises
        ------
        UserError
            If it cannot be written, or a run of another process has the folder; a file that was
            there before stays as it was.
        """
        self.lock = results.locked(path.parent)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{key: getattr(self, key) for key in _PROGRESS},
            "ema": self.ema.module.state_dict(),
            "recipe": recipe.resume_key(),
            "data": data,
        }
        if masks is not None:
            state["masks"] = masks
        try:
            with results.replacing(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # RuntimeError is what torch raises on a full disk
            raise UserError(f"{path}: the state cannot be written ({first_line(error)})") from error

    def resume(
        self,
        path: Path,
        recipe: Recipe,
        data: str,
        masks: str | None = None,
        columns: Collection[str] | None = None,
        total: int = sys.maxsize,
    ) -> None:
        """Continue from a saved state; the first parameters are those of `save`.

        Parameters
        ----------
        columns : those of the history; None takes any.
        total : optimiser steps of the whole run.

        Raises
        ------
        UserError
            For a damaged file, the state of another recipe, of other images or other masks, and if
            a run of another process has the folder.
        """
        self.lock = results.locked(path.parent)
        state = _read(path)
        if state.get("done") == 0:  # saved before the first step: there is nothing to continue
            return
        saved = state["recipe"]
        differing = [
            f"{key}: {saved.get(key)!r} there, {value!r} now"
            for key, value in recipe.resume_key().items()
            if saved.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{path} is of another recipe ({'; '.join(differing)}); --overwrite starts again"
            )
        if state.get("data") != data:
            raise UserError(
                f"{path} is of other images than {recipe.data} holds now; --overwrite starts again"
            )
        if state.get("masks") != masks:
            raise UserError(
                f"{path} was trained under other masks than these; --overwrite starts again"
            )
        try:
            self._load(state, columns, total)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: {_INCOMPLETE} ({first_line(error)}); --overwrite starts again"
            ) from error

    def _load(self, state: dict[str, Any], columns: Collection[str] | None, total: int) -> None:
        done = saved_parts.whole(state, "done", 1, total)
        sums = {key: saved_parts.number(state, key) for key in ("loss", "norm", "seconds")}
        history = saved_parts.rows(state, columns)
        precision = saved_parts.word(state, "precision", ("bf16", "off"))
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        # `capturable` depends on the device of this process, not on that of the saved run
        capturable = [group["capturable"] for group in self.optimizer.param_groups]
        saved_parts.load_optimizer(self.optimizer, state["optimizer"])
        for group, value in zip(self.optimizer.param_groups, capturable, strict=True):
            group["capturable"] = value
        self.done, self.history, self.precision = done, history, precision
        self.loss, self.norm, self.seconds = sums["loss"], sums["norm"], sums["seconds"]


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "recipe": dict(state["recipe"])}
    except (
        Exception
    ) as error:  # depends on the damage: UnpicklingError, RuntimeError, EOFError, ...
        raise UserError(
            f"{path}: {_INCOMPLETE} ({first_line(error)}); --overwrite starts again"
        ) from error
