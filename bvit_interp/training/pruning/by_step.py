"""Pruning with a mask for every step: which weights of the one block does each step keep?

Appendix G of the paper (arXiv 2605.10661) after Routing the Lottery (arXiv 2601.22141). A round
trains the model from its first weights under the masks so far, trains a graft for every step
(`graft.py`), and takes from each step's mask the share `rate` of its active weights that are
smallest in its graft; then the weights go back to the first ones. After p prunings a mask keeps
0.8^p of the block's weights (Table 7). Ours: ranking over the four matrices of a step together
(only so can a layer be emptied, as the paper reports), one more training after the last pruning, so
that every mask has its accuracy, and the two baselines, from the same first weights:

- ``magnitude``: one mask for all steps, by the trained weights themselves (Frankle & Carbin 2019,
  arXiv 1803.03635);
- ``random``: masks drawn for every step on its own, of the same density and nested over the rounds.
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
from torch import Tensor

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError, choices
from bvit_interp.models import checkpoint
from bvit_interp.models.bvit import BViT
from bvit_interp.models.masks import PLACES, Masks, full
from bvit_interp.training.loop import build as start
from bvit_interp.training.loop import feed, supervised
from bvit_interp.training.loop.draws import drawn_for
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.loop.state import STATE
from bvit_interp.training.loop.trainer import HISTORY
from bvit_interp.training.pruning import grafts as graft
from bvit_interp.training.pruning.step_plan import METHODS, StepPlan

_log = logging.getLogger(__name__)
TABLE, PRUNED, GRAFTS, LOSSES = "rounds.csv", "pruned.safetensors", "grafts.pt", "grafts.csv"
COLUMNS = {
    "method": "rtl (a graft a step), magnitude (one mask for all steps) or random (drawn for each step)",
    "round": "training from the first weights, from 1; its folder is METHOD/round-NN",
    "prunings": "prunings that its masks have undergone, p of Table 7: round - 1",
    "expected": "1 - (1 - rate)^p, 0..1",
    "mask_sparsity": "1 - mean over the steps of a mask's share of active weights, 0..1",
    "weight_sparsity": "share of the four matrices' weights that no step keeps, 0..1",
    "weight_sparsity_layers": "the same as the unweighted mean of the four matrices', 0..1",
    "fully_pruned": "layers without an active weight, as fc2[3] (of step 3), or none",
    "top1": "share of test images classified right by the raw weights under the masks, 0..1",
    "ema_top1": "the same of the averaged weights, 0..1",
    "test_loss": "mean test cross-entropy of the raw weights, nats",
    "ema_loss": "the same of the averaged weights, nats",
    "train_loss": "mean training loss of the last epoch, nats",
    "chance": "the null of top1: share of the most frequent test class, 0..1",
    "n": "test images",
    "epochs": "of the training",
    "seed": "of the recipe",
}
_SCORES = {
    "top1": "top1",
    "ema_top1": "ema_top1",
    "test_loss": "test_loss",
    "ema_loss": "ema_loss",
    "train_loss": "loss",
    "chance": "chance",
}


def smallest_off(
    masks: Masks, weights: Mapping[str, Tensor], rate: float, ranking: str = "global"
) -> Masks:
    """The masks without the share `rate` of each one's active weights that are smallest.

    Parameters
    ----------
    masks : K masks.
    weights : component -> ``(K, *shape)``; those of mask k rank its entries by absolute value.
    rate : of n active weights ``n - round(n (1 - rate))`` go.
    ranking : "global" over all components of a mask, or "layer", in each.
    """
    pruned = {name: mask.clone() for name, mask in masks.items()}
    groups = [list(masks)] if ranking == "global" else [[name] for name in masks]
    for k in range(masks.count):
        for group in groups:
            active = torch.cat([pruned[name][k].flatten() for name in group])
            size = torch.cat([weights[name][k].flatten() for name in group]).abs()
            places = active.nonzero().squeeze(1)
            order = size[places].argsort(stable=True)  # equal ones: the first goes first
            active[places[order[: len(places) - round(len(places) * (1 - rate))]]] = False
            for name, part in zip(
                group, active.split([pruned[name][k].numel() for name in group]), strict=True
            ):
                pruned[name][k] = part.view_as(pruned[name][k])
    return Masks(pruned, masks.blocks)


def run(
    recipe: Recipe,
    pruning: StepPlan,
    out: Path,
    device: str = "cpu",
    *,
    overwrite: bool = False,
    save_minutes: float = 2.0,
) -> pd.DataFrame:
    """Prune by every method, or go on where this stopped, and return the table, a row of `COLUMNS`
    a round.

    Parameters
    ----------
    recipe : of each round's training; its model is a bViT of one block without a memory.
    pruning : how often, how much, by what.
    out : folder of ``rounds.csv`` and of ``METHOD/round-NN``: a checkpoint with its masks, opened
        as ``METHOD/round-NN@masked``, ``pruned.safetensors`` (the masks of the next round, over the
        first weights) and for rtl ``grafts.csv`` (`graft.COLUMNS`).
    device, save_minutes : as in `supervised.train`.
    overwrite : start again; the rounds in `out` are removed.

    Raises
    ------
    UserError
        A model that has no grafts, a folder of other options, and what a training refuses.
    """
    results.check_folder(out)
    samples = open_samples(recipe.data, "train")
    init = start.make_model(recipe, samples)
    graft.check(init)
    options = {
        "recipe": recipe.resume_key(),
        "rate": pruning.rate,
        "ranking": pruning.ranking,
        "graft_epochs": pruning.graft_epochs,
        "images": feed.fingerprint(samples),
    }
    table = _table(out, options, overwrite)
    n = len(open_samples(recipe.data))
    for method in pruning.methods:
        masks = full(init)
        for number in range(1, pruning.rounds + 2):
            folder = out / method / f"round-{number:02d}"
            if not table.has(method=method, round=number):
                if number == 1:
                    _share_first_round(folder, table)
                supervised.train(recipe, folder, device, save_minutes=save_minutes, masks=masks)
                about = _about(masks, number - 1, pruning.rate)
                if about["fully_pruned"] != "none":
                    _log.warning("%s: fully pruned: %s", folder, about["fully_pruned"])
                scores = {**_scores(folder), "n": n, "epochs": recipe.epochs, "seed": recipe.seed}
                table.append({"method": method, "round": number, **about, **scores})
            if results.rank_and_world()[0] == 0 and number > 1:
                (folder / STATE).unlink(
                    missing_ok=True
                )  # four times the weights, and nothing goes on from it
            if number <= pruning.rounds:
                masks = _next(
                    method,
                    recipe,
                    pruning,
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
    pruning: StepPlan,
    init: BViT,
    masks: Masks,
    samples: Samples,
    folder: Path,
    number: int,
    device: str,
    save_minutes: float,
) -> Masks:
    """The masks of the round after `number`: those in its folder, or made now and kept there."""
    first = results.rank_and_world()[0] == 0
    if not (folder / PRUNED).is_file():
        if method == "rtl":
            main = checkpoint.load(f"{folder}@masked")
            weights, losses = graft.train(
                recipe,
                pruning.graft_epochs,
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
            weights = _trained(checkpoint.load(folder), masks)
        else:
            weights = _drawn(recipe.seed, number, masks)
        pruned = smallest_off(masks, weights, pruning.rate, pruning.ranking)
        if first:
            pruned.save(folder / PRUNED, init)
        if results.rank_and_world()[1] > 1:
            dist.barrier()  # none may find the file half of the others are still making
    if first:
        (folder / GRAFTS).unlink(missing_ok=True)
    return Masks.load(folder / PRUNED, init)


def _trained(model: Any, masks: Masks) -> dict[str, Tensor]:
    """The trained weights, the same for every mask: masks that were equal stay so."""
    block = next(model.blocks.children())
    return {
        name: block.get_submodule(place).weight.detach().expand_as(masks[name])
        for name, place in PLACES.items()
    }


def _drawn(seed: int, number: int, masks: Masks) -> dict[str, Tensor]:
    """Numbers that rank at random, drawn for the round."""
    with drawn_for(seed, number, 2):
        return {name: torch.rand(mask.shape) for name, mask in masks.items()}


def _about(masks: Masks, prunings: int, rate: float) -> dict[str, Any]:
    """The columns that the masks decide."""
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
    """The table of `out`; with `overwrite` an empty one, and the rounds are gone."""
    first, world = results.rank_and_world()[0] == 0, results.rank_and_world()[1]
    there = (folder for method in METHODS for folder in sorted((out / method).glob("round-*")))
    rounds = [folder for folder in there if re.fullmatch(r"round-\d\d+", folder.name)]
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
            f"{out} holds the pruned {choices(done)} and no {TABLE}: give another --out or --overwrite"
        )
    return results.Table(out / TABLE, options, overwrite)


def _share_first_round(folder: Path, table: results.Table) -> None:
    """The first round is without masks and so the same for all methods: copy that of another."""
    others = [folder.parents[1] / method / folder.name for method in METHODS]
    finished = [
        other for other in others if table.has(method=other.parent.name, round=1) and other.is_dir()
    ]
    if finished and not folder.exists() and results.rank_and_world()[0] == 0:
        for left in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left)  # by a process killed while it copied
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.copytree(finished[0], partial, ignore=shutil.ignore_patterns(PRUNED, GRAFTS, LOSSES))
        partial.replace(folder)
    if results.rank_and_world()[1] > 1:
        dist.barrier()
