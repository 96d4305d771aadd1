"""The loop of a transfer: AdamW on what an adapter trains, a run that survives being killed, and
the probe's checks.

A run's state is written after every epoch, whole or not at all, and every draw is a function of
(seed, epoch), so that a run killed at any moment ends with the same weights
(`bvit_interp.training.loop.supervised` does the same).
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from bvit_interp import results
from bvit_interp.data.samples import first_line
from bvit_interp.errors import UserError
from bvit_interp.models.adapters import Adapted
from bvit_interp.training.loop import build
from bvit_interp.training.loop.draws import drawn_for
from bvit_interp.training.loop.feed import Share
from bvit_interp.training.loop.recipe import Recipe

STATE = "state.pt"
_log = logging.getLogger(__name__)


def fit(
    forward: Callable[[Tensor], Tensor],
    adapted: Adapted,
    batches: Callable[[int], Iterable[Share]],
    images: int,
    recipe: Recipe,
    path: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> float:
    """Train what `adapted` trains, or go on from the state in `path`; returns the last epoch's mean
    loss, nats.

    Parameters
    ----------
    forward : inputs ``(b, ...)`` -> logits ``(b, C)``.
    batches : this process's share of the batches of an epoch (from 0).
    images : how many an epoch has, whole batches or not.
    path, about : the state's file, and what its run must share to be gone on with.

    Raises
    ------
    UserError
        A loss that is not finite, or the state of another run.
    """
    device, name = next(adapted.view.parameters()).device, str(recipe.model["name"])
    rank, world = results.rank_and_world()
    steps = images // recipe.batch_size
    optimizer = _optimizer(adapted, recipe)
    schedule = build.schedule(optimizer, recipe, steps)
    done, mean = (
        (0, math.nan) if path is None else _resumed(path, dict(about or {}), adapted, optimizer)
    )
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
                _keep(path, dict(about or {}), adapted, optimizer, epoch + 1, mean)
    return mean


def _average(tensors: Iterable[Tensor | None]) -> None:
    """Means over the processes, in place; shares are equally large."""
    for tensor in tensors:
        if tensor is not None:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def _optimizer(adapted: Adapted, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms, biases, tokens and embeddings are free of weight decay."""
    free = adapted.model.no_weight_decay()
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, tensor in adapted.trained.items():
        groups[tensor.ndim > 1 and name not in free].append(tensor)
    decay = recipe.weight_decay
    listed = [{"params": of, "weight_decay": decay * decays} for decays, of in groups.items() if of]
    return torch.optim.AdamW(listed, lr=recipe.lr)


def _keep(
    path: Path,
    about: dict[str, Any],
    adapted: Adapted,
    optimizer: torch.optim.Optimizer,
    done: int,
    loss: float,
) -> None:
    state = {
        "about": about,
        "trained": dict(adapted.trained),
        "optimizer": optimizer.state_dict(),
        "done": done,
    }
    try:
        with results.replacing(path) as temporary:
            torch.save({**state, "loss": loss}, temporary)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
        raise UserError(f"{path}: the state cannot be written ({first_line(error)})") from error


def _resumed(
    path: Path, about: dict[str, Any], adapted: Adapted, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Epochs done and their last loss, the trained tensors and the moments taken up; (0, nan)
    without a state."""
    if not path.is_file():
        return 0, math.nan
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(state["about"])
        if found == about:
            with torch.no_grad():
                for name, tensor in adapted.trained.items():
                    tensor.copy_(state["trained"][name])
            optimizer.load_state_dict(state["optimizer"])
            return int(state["done"]), float(state["loss"])
    except (
        Exception
    ) as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... as the damage is
        raise UserError(
            f"{path}: not the whole state of a run ({first_line(error)}); delete it"
        ) from error
    differing = [
        f"{key}: {found.get(key)!r} there, {about[key]!r} now"
        for key in about
        if found.get(key) != about[key]
    ]
    raise UserError(
        f"{path} is of another run ({'; '.join(differing)}); give another --out or --overwrite"
    )


def shares(pairs: Share, recipe: Recipe, epoch: int) -> Iterator[Share]:
    """The batches of an epoch over features ``(n, D)`` and labels ``(n,)``, in the order in which
    `feed.Epoch` shows the images; each process gets all of them."""
    features, labels = pairs
    order = torch.from_numpy(
        np.random.default_rng([recipe.seed, epoch]).permutation(len(labels))
    ).to(labels.device)
    for place in range(0, len(labels) - recipe.batch_size + 1, recipe.batch_size):
        own = order[place : place + recipe.batch_size]
        yield features[own], labels[own]


def exact_accuracy(train: Share, test: Share) -> float:
    """Test accuracy of multinomial logistic regression solved to its optimum (L-BFGS, L2 with C =
    1) on features.

    A cross-check of the probe: one far below it has not converged; one above it gained by stopping
    early.
    """
    solver = LogisticRegression(C=1.0, max_iter=2000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        solver.fit(train[0].double().cpu().numpy(), train[1].cpu().numpy())
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        _log.warning("the exact solver stopped before its optimum")
    return float(solver.score(test[0].double().cpu().numpy(), test[1].cpu().numpy()))


def untrained(model: VisionTransformer, seed: int) -> VisionTransformer:
    """The same architecture with fresh weights, drawn as when the model is made; frozen features of
    it are a null."""
    twin = copy.deepcopy(model)
    with drawn_for(seed), torch.no_grad():
        for module in twin.modules():
            if module is not twin and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        twin.init_weights()
        for name, tensor in twin.named_parameters():
            if name.endswith("step_embed"):
                tensor.zero_()
    return twin
