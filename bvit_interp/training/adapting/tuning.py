"""Train the parameters of an adapter with AdamW; a killed run continues.

The state of a run is written after every epoch, completely or not at all. All random draws depend
on (seed, epoch) alone. A run that is killed at any moment therefore ends with the same weights, as
in `bvit_interp.training.loop.supervised`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.errors import UserError, first_line
from bvit_interp.models.adapters import Adapted
from bvit_interp.models.stepping import device_of
from bvit_interp.training.adapting.transfer_plan import DEFAULTS, Plan
from bvit_interp.training.loop import build, saved_parts
from bvit_interp.training.loop.feed import Share
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.vocabulary import AdapterMode

STATE = "state.pt"


def recipe_of(plan: Plan, mode: AdapterMode, seed: int, data: str, images: int) -> Recipe:
    """The recipe of one run of a transfer: its schedule and its batches.

    Parameters
    ----------
    data : name of the data set.
    images : number of training images.
    """
    lr, min_lr, decay = (
        default if given is None else given
        for given, default in zip(
            (plan.lr, plan.min_lr, plan.weight_decay), DEFAULTS[mode], strict=True
        )
    )
    batch = min(plan.train_batch or (128 if data.startswith("cifar") else 64), images)
    return Recipe(
        model={"name": mode},
        data=data,
        epochs=plan.epochs,
        batch_size=batch,
        lr=lr,
        min_lr=min_lr,
        warmup_epochs=plan.epochs / 8,
        weight_decay=decay,
        clip=None,
        autocast=plan.autocast,
        seed=seed,
        workers=plan.workers,
        skip_corrupt=plan.skip_corrupt,
    )


def fit(
    forward: Callable[[Tensor], Tensor],
    adapted: Adapted,
    batches: Callable[[int], Iterable[Share]],
    images: int,
    recipe: Recipe,
    path: Path | None = None,
    keys: Mapping[str, Any] | None = None,
) -> float:
    """Train what `adapted` trains, or continue from the state in `path`.

    Parameters
    ----------
    forward : inputs ``(b, ...)`` -> logits ``(b, C)``.
    batches : number of an epoch (from 0) -> this process's share of its batches.
    images : number of images per epoch, those of an incomplete last batch included.
    path : file of the state; by default no state is written.
    keys : what a saved state must agree with.

    Returns
    -------
    Mean loss of the last epoch, nats.

    Raises
    ------
    UserError
        For a loss that is not finite, and for the state of another run.
    """
    device, name = device_of(adapted.view), str(recipe.model["name"])
    rank, world = results.rank_and_world()
    steps = images // recipe.batch_size
    optimizer = _optimizer(adapted, recipe)
    schedule = build.schedule(optimizer, recipe, steps)
    done, mean = 0, math.nan
    if path is not None and path.is_file():
        done, mean = _resume(path, dict(keys or {}), adapted, optimizer, recipe.epochs)
    with tqdm(total=recipe.epochs, initial=done, desc=name, unit="epoch", disable=rank > 0) as bar:
        for epoch in range(done, recipe.epochs):
            total = torch.zeros((), device=device)
            for step, (inputs, labels) in enumerate(batches(epoch)):
                schedule.step_update(epoch * steps + step)
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast != "off"):
                    logits = forward(inputs.to(device, non_blocking=True))
                loss = F.cross_entropy(logits.float(), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                if world > 1:
                    _average(tensor.grad for tensor in adapted.trained.values())
                optimizer.step()
                total += loss.detach()
            if world > 1:
                _average([total])
            mean = float(total) / steps
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} in epoch {epoch + 1} of {name}: lower lr")
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}")
            if path is not None and rank == 0:
                _save(path, dict(keys or {}), adapted, optimizer, epoch + 1, mean)
    return mean


def _average(tensors: Iterable[Tensor | None]) -> None:
    """Mean over the processes, in place; all processes see equally many images."""
    for tensor in tensors:
        if tensor is not None:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def _optimizer(adapted: Adapted, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms, biases, tokens and embeddings have no weight decay."""
    undecayed = adapted.model.no_weight_decay()
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, tensor in adapted.trained.items():
        groups[tensor.ndim > 1 and name not in undecayed].append(tensor)
    return torch.optim.AdamW(
        [
            {"params": tensors, "weight_decay": recipe.weight_decay if decays else 0.0}
            for decays, tensors in groups.items()
            if tensors
        ],
        lr=recipe.lr,
    )


def _save(
    path: Path,
    keys: dict[str, Any],
    adapted: Adapted,
    optimizer: torch.optim.Optimizer,
    done: int,
    loss: float,
) -> None:
    state = {
        "about": keys,
        "trained": dict(adapted.trained),
        "optimizer": optimizer.state_dict(),
        "done": done,
        "loss": loss,
    }
    try:
        with results.replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch raises on a full disk
        raise UserError(f"{path}: the state cannot be written ({first_line(error)})") from error


def _resume(
    path: Path,
    keys: dict[str, Any],
    adapted: Adapted,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> tuple[int, float]:
    """Load the trained tensors and the moments; returns the finished epochs and the last loss."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(state["about"])
        if found == keys:
            done = saved_parts.whole(state, "done", 1, epochs)
            loss = saved_parts.number(state, "loss")
            saved_parts.load_tensors(adapted.trained, state["trained"])
            saved_parts.load_optimizer(optimizer, state["optimizer"])
            return done, loss
    except (
        Exception
    ) as error:  # depends on the damage: UnpicklingError, RuntimeError, EOFError, ...
        raise UserError(
            f"{path}: not the whole state of a run ({first_line(error)}); delete it"
        ) from error
    differing = [
        f"{key}: {found.get(key)!r} there, {keys[key]!r} now"
        for key in keys
        if found.get(key) != keys[key]
    ]
    raise UserError(
        f"{path} is of another run ({'; '.join(differing)}); give another --out or --overwrite"
    )
