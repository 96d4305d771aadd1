"""What a training run has become, in one file: weights, moments, history and how far it is.

There is no state of random numbers or of a sampler to keep: every draw is a function of (seed,
epoch, image).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import ModelEmaV3

from bvit_interp import results
from bvit_interp.data.samples import first_line
from bvit_interp.errors import UserError
from bvit_interp.models.bvit import BViT
from bvit_interp.training.loop.recipe import Recipe

STATE = "state.pt"
_COUNTED = ("done", "loss", "norm", "seconds", "history", "precision")
_NO_STATE = "not the whole state of a run"


@dataclass
class Run:
    """What a run has become: the contents of `state.pt`.

    Parameters
    ----------
    model, ema, optimizer : the raw weights, the averaged ones and AdamW's moments.
    done : optimiser steps taken.
    loss, norm : sums over the steps of the current epoch.
    seconds : time spent training in the current epoch.
    history : a row of `COLUMNS` for every finished epoch.
    precision : bf16 or off, as the run trains; a run goes on as it began.
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

    def average(self) -> None:
        """Move the averaged weights towards the raw ones after a step, by the decay of `ema`.

        As `ModelEmaV3.update`, but for the names: building two state dicts takes longer than a
        GPU's step.
        """
        decay = self.ema.get_decay(self.done + 1)
        averaged, raw = list(self.ema.module.parameters()), list(self.model.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averaged, raw, 1 - decay)

    def save(self, path: Path, recipe: Recipe, data: str, masks: str | None = None) -> None:
        """Write the state, with the fingerprints of its data and of its masks, if any; on an error
        (`UserError`) the file there stays as it was."""
        parts = {key: getattr(self, key).state_dict() for key in ("model", "optimizer")}
        counted = {key: getattr(self, key) for key in _COUNTED}
        state = {**parts, **counted, "ema": self.ema.module.state_dict()} | {
            "recipe": recipe.resume_key(),
            "data": data,
            **({} if masks is None else {"masks": masks}),
        }
        try:
            with results.replacing(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
            raise UserError(f"{path}: the state cannot be written ({first_line(error)})") from error

    def resume(self, path: Path, recipe: Recipe, data: str, masks: str | None = None) -> None:
        """Take up a saved state; one of another recipe, of other data or under other masks is
        refused."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved = dict(state["recipe"])
        except (
            Exception
        ) as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... as the damage is
            raise UserError(
                f"{path}: {_NO_STATE} ({first_line(error)}); --overwrite starts again"
            ) from error
        if state.get("done") == 0:  # saved before the first step: nothing to go on with
            return
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
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            capturable = [
                group["capturable"] for group in self.optimizer.param_groups
            ]  # of this device
            self.optimizer.load_state_dict(state["optimizer"])
            for group, own in zip(self.optimizer.param_groups, capturable, strict=True):
                group["capturable"] = own
            for key in _COUNTED:
                setattr(self, key, state[key])
            if not isinstance(self.history, list) or not isinstance(self.done, int):
                raise ValueError("its parts have other types")
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: {_NO_STATE} ({first_line(error)}); --overwrite starts again"
            ) from error
