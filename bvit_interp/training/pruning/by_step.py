"""Which weights of the one block does each step need?

Appendix G of the paper (arXiv 2605.10661) follows Routing the Lottery (arXiv 2601.22141). A round
trains the model from its first weights under the masks so far, and trains a graft for every step
(`grafts.py`). Then it removes from each step's mask the share `rate` of its active weights that are
smallest in its graft, and resets the weights to the first ones. After p prunings a mask keeps
0.8^p of the block's weights (Table 7). Our choices: ranking over the four matrices of a step
together (only then can a layer be emptied, as the paper reports); one more training after the last
pruning, so that every mask is scored; and two baselines from the same first weights:

- ``magnitude``: one mask for all steps, by the trained weights themselves (Frankle & Carbin 2019,
  arXiv 1803.03635);
- ``random``: random masks, independent for every step, with the same density and nested over the
  rounds.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError, choices
from bvit_interp.models import checkpoint
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import PLACES, Masks, full
from bvit_interp.training.loop import build, feed, supervised
from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.state import STATE
from bvit_interp.training.loop.trainer import HISTORY
from bvit_interp.training.pruning import graft_training
from bvit_interp.training.pruning.criteria import prune_smallest
from bvit_interp.training.pruning.grafts import check_model
from bvit_interp.training.pruning.step_plan import METHODS, StepPlan

_log = logging.getLogger(__name__)
TABLE = "rounds.csv"
PRUNED = "pruned.safetensors"
GRAFTS = "grafts.pt"
LOSSES = "grafts.csv"
COLUMNS = {
    "method": "rtl (a graft per step), magnitude (one mask for all steps) or random (independent"
    " random masks of the steps: the null)",
    "round": "number of the training from the first weights, from 1; its folder is METHOD/round-NN",
    "prunings": "number of prunings before this round, p of Table 7: round - 1",
    "expected": "expected sparsity of a mask: 1 - (1 - rate)^p, 0..1",
    "mask_sparsity": "1 minus the mean over steps of the share of active weights in a mask, 0..1",
    "weight_sparsity": "share of the weights of the four matrices that no step keeps, 0..1",
    "weight_sparsity_layers": "weight sparsity as the unweighted mean over the four matrices, 0..1",
    "fully_pruned": "layers without an active weight, as fc2[3] for step 3, or none",
    "accuracy": "share of test images classified correctly by the raw weights under the masks,"
    " 0..1",
    "ema_accuracy": "accuracy of the averaged weights, 0..1",
    "test_loss": "mean test cross-entropy of the raw weights, nats",
    "ema_loss": "mean test cross-entropy of the averaged weights, nats",
    "train_loss": "mean training loss of the last epoch, nats",
    "chance": "null of the accuracy: share of the most frequent test class, 0..1",
    "n": "number of test images",
    "epochs": "epochs of the training",
    "seed": "random seed of the recipe",
}
_SCORES = {
    "accuracy": "top1",
    "ema_accuracy": "ema_top1",
    "test_loss": "test_loss",
    "ema_loss": "ema_loss",
    "train_loss": "loss",
    "chance": "chance",
}
"""Column -> its column in the history of a training."""


def run(
    recipe: Recipe,
    plan: StepPlan,
    out: Path,
    device: str = "cpu",
    *,
    overwrite: bool = False,
    save_minutes: float = 2.0,
) -> pd.DataFrame:
    """Prune by every method, or continue a pruning that was stopped; returns the table.

    Parameters
    ----------
    recipe : recipe of each round's training. Its model is a bViT of one block without a memory.
    plan : how often, how much, and by which methods.
    out : folder of ``rounds.csv`` (a row of `COLUMNS` per round) and of ``METHOD/round-NN``. The
        latter holds a checkpoint with its masks, opened as ``METHOD/round-NN@masked``;
        ``pruned.safetensors``, the masks of the next round, over the first weights; and for rtl
        ``grafts.csv`` (`graft_training.COLUMNS`).
    device, save_minutes : as in `supervised.train`.
    overwrite : start again. The rounds in `out` are removed.

    Raises
    ------
    UserError
        For a model without grafts, a folder with results of other options, or what a training
        refuses.
    """
    results.check_folder(out)
    samples = open_samples(recipe.data, "train")
    init = build.make_model(recipe, samples)
    check_model(init)
    options = {
        "recipe": recipe.resume_key(),
        "rate": plan.rate,
        "ranking": plan.ranking,
        "graft_epochs": plan.graft_epochs,
        "images": feed.fingerprint(samples),
    }
    table = _table(out, options, overwrite)
    n = len(open_samples(recipe.data))
    for method in plan.methods:
        masks = full(init)
        for number in range(1, plan.rounds + 2):
            folder = out / method / f"round-{number:02d}"
            if not table.has(method=method, round=number):
                if number == 1:
                    _share_first_round(folder, table)
                supervised.train(recipe, folder, device, save_minutes=save_minutes, masks=masks)
                about = _about(masks, number - 1, plan.rate)
                if about["fully_pruned"] != "none":
                    _log.warning("%s: fully pruned: %s", folder, about["fully_pruned"])
                scores = {**_scores(folder), "n": n, "epochs": recipe.epochs, "seed": recipe.seed}
                table.append({"method": method, "round": number, **about, **scores})
            if results.rank_and_world()[0] == 0 and number > 1:
                # it takes four times the space of the weights, and is no longer needed
                (folder / STATE).unlink(missing_ok=True)
            if number <= plan.rounds:
                masks = _next(
                    method,
                    recipe,
                    plan,
                    init,
                    masks,
                    samples,
                    folder,
                    number,
                    device,
                    save_minutes,
                )
    return pd.DataFrame(table.rows)[list(COLUMNS)]


def _next(
    method: str,
    recipe: Recipe,
    plan: StepPlan,
    init: BViT,
    masks: Masks,
    samples: Samples,
    folder: Path,
    number: int,
    device: str,
    save_minutes: float,
) -> Masks:
    """The masks of the next round, read from the folder of round `number`, or made and saved."""
    first = results.rank_and_world()[0] == 0
    if not (folder / PRUNED).is_file():
        if method == "rtl":
            main = checkpoint.load_vit(f"{folder}@masked")
            weights, losses = graft_training.train(
                recipe,
                plan.graft_epochs,
                init,
                main,
                masks,
                samples,
                folder / GRAFTS,
                device,
                save_minutes=save_minutes,
            )
            if first:
                results.write_table(losses, folder / LOSSES)
        elif method == "magnitude":
            weights = _trained(checkpoint.load_vit(folder), masks)
        else:
            weights = _drawn(recipe.seed, number, masks)
        pruned = prune_smallest(masks, weights, plan.rate, plan.ranking)
        if first:
            pruned.save(folder / PRUNED, init)
        if results.rank_and_world()[1] > 1:
            dist.barrier()  # no process may find a file that another is still writing
    if first:
        (folder / GRAFTS).unlink(missing_ok=True)
    return Masks.load(folder / PRUNED, init)


def _trained(model: VisionTransformer, masks: Masks) -> dict[str, Tensor]:
    """The trained weights, the same for every mask, so that equal masks stay equal."""
    block = next(model.blocks.children())
    return {
        name: block.get_parameter(f"{place}.weight").detach().expand_as(masks[name])
        for name, place in PLACES.items()
    }


def _drawn(seed: int, number: int, masks: Masks) -> dict[str, Tensor]:
    """Random numbers by which a round ranks the weights."""
    with seeded(seed, number, 2):
        return {name: torch.rand(mask.shape) for name, mask in masks.items()}


def _about(masks: Masks, prunings: int, rate: float) -> dict[str, Any]:
    """The columns that follow from the masks."""
    union, weights = masks.union(), sum(mask[0].numel() for mask in masks.values())
    kept = {name: float(mask.double().mean()) for name, mask in union.items()}
    empty = [
        f"{name}[{t}]"
        for t in range(1, masks.count + 1)
        for name, mask in masks.items()
        if not mask[t - 1].any()
    ]
    return {
        "prunings": prunings,
        "expected": 1 - (1 - rate) ** prunings,
        "mask_sparsity": 1 - float(masks.density().mean()),
        "weight_sparsity": 1 - sum(int(mask.sum()) for mask in union.values()) / weights,
        "weight_sparsity_layers": 1 - sum(kept.values()) / len(kept),
        "fully_pruned": " ".join(empty) or "none",
    }


def _scores(folder: Path) -> dict[str, float]:
    history = results.read_table(folder / HISTORY)
    if not len(history) or not {*_SCORES.values()} <= {*history.columns}:
        raise UserError(f"{folder / HISTORY}: not the history of a run; --overwrite starts again")
    return {name: float(history[column].iloc[-1]) for name, column in _SCORES.items()}


def _table(out: Path, options: Mapping[str, Any], overwrite: bool) -> results.Table:
    """The table of `out`; with `overwrite` an empty one, and the rounds are removed."""
    first, world = results.rank_and_world()[0] == 0, results.rank_and_world()[1]
    folders = (folder for method in METHODS for folder in sorted((out / method).glob("round-*")))
    rounds = [folder for folder in folders if re.fullmatch(r"round-\d\d+", folder.name)]
    if overwrite and first:
        (out / TABLE).unlink(missing_ok=True)
        for folder in rounds:
            shutil.rmtree(folder)
    if world > 1:
        dist.barrier()
    done = [
        f"{folder.parent.name}/{folder.name}" for folder in rounds if (folder / PRUNED).is_file()
    ]
    if done and not (out / TABLE).exists():
        raise UserError(
            f"{out} holds the pruned {choices(done)} and no {TABLE}:"
            " give another --out or --overwrite"
        )
    return results.Table(out / TABLE, options, overwrite)


def _share_first_round(folder: Path, table: results.Table) -> None:
    """Copy the first round of another method: it has no masks, so it is the same for all."""
    others = [folder.parents[1] / method / folder.name for method in METHODS]
    finished = [
        other for other in others if table.has(method=other.parent.name, round=1) and other.is_dir()
    ]
    if finished and not folder.exists() and results.rank_and_world()[0] == 0:
        for left in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left)  # left by a process that was killed while copying
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.copytree(finished[0], partial, ignore=shutil.ignore_patterns(PRUNED, GRAFTS, LOSSES))
        partial.replace(folder)
    if results.rank_and_world()[1] > 1:
        dist.barrier()
