"""Which weights does each class, cluster or environment of the data need?

Routing the Lottery (arXiv 2601.22141). Extraction (Algorithm 1): for every subset the model is
trained from its first weights, under the subset's mask and on the subset's images. Then the
smallest of the remaining weights are pruned and the weights are reset, until the target sparsity is
reached. Retraining (Algorithm 2, `routing.py`): the subnetworks are trained together in one dense
tensor. Test images are routed by their known subset; subnetworks of classes predict one-vs-rest,
each for all images. The paper's baselines are trained on as many images: ``imp``, one mask and one
model for all (Frankle & Carbin 2019, arXiv 1803.03635), and ``multi``, a model per subset. The
masks of multi are those of rtl, whose extraction is the same for each subset.

Our additions: ``random``, which is rtl with random masks; subsets (class, step) of a bViT, for
which the steps are untied while masks are sought, so that each step's weights show what that step
needs; pruning in equal ratios, of at most `rate` per round, so that every target is met; and, if
asked for, first weights that have been trained a little (`rewind`), from which even a run of
a few minutes finds masks that differ.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from bvit_interp import results
from bvit_interp.errors import UserError, choices
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning import routing, ticket_table
from bvit_interp.training.pruning.lottery import TABLE, Lottery
from bvit_interp.training.pruning.subnetworks import Subnets
from bvit_interp.training.pruning.ticket_plan import TicketPlan
from bvit_interp.training.pruning.ticket_table import ALL, COLUMNS

SUMMARY = [
    "method",
    "sparsity",
    "ratio",
    "similarity",
    "null_similarity",
    "recall",
    "precision",
    "balanced_accuracy",
    "swapped",
    "accuracy",
    "chance",
]
"""Columns of the summary."""
_log = logging.getLogger(__name__)


def run(
    recipe: Recipe, plan: TicketPlan, out: Path, device: str = "cpu", *, overwrite: bool = False
) -> pd.DataFrame:
    """Find and train the subnetworks, or continue a search that was stopped; returns the table.

    Parameters
    ----------
    recipe : model, data (`images_per_epoch` of its training images take part), optimiser and
        augmentation. The model may be any timm model with one classifier.
    plan : subsets, sparsities and methods.
    out : folder of ``tickets.csv`` (rows of `COLUMNS`), ``trainings.csv`` (a row per finished
        training), ``subsets.csv`` (the subset of each image), ``extraction/`` (masks of each subset
        and round) and ``subnets/METHOD/round-NN/NN/``: the weights and masks of each model.
    device : device of this process.
    overwrite : start again.

    Raises
    ------
    UserError
        For a subset without images, a single subset, a sparsity that leaves nothing, or a folder
        with results of other options.
    """
    results.check_folder(out)
    lottery = Lottery(recipe, plan, out, device, overwrite)
    rows: list[dict[str, Any]] = []
    if (out / TABLE).exists():
        frame = results.read_table(out / TABLE)
        if set(frame) != set(COLUMNS):
            raise UserError(f"{out / TABLE} has other columns; --overwrite replaces it")
        rows += [dict(zip(frame.columns, row, strict=True)) for row in frame.to_numpy(object)]
    frame = pd.DataFrame(rows, columns=[*COLUMNS])
    with lottery.bar:
        for number in range(lottery.first, lottery.first + len(lottery.rounds)):
            for method in plan.methods:
                done = any(row["method"] == method and row["round"] == number for row in rows)
                lottery.bar.set_postfix_str(f"{method} round {number}")
                rows += [] if done else table_rows(lottery, method, number)
                if not done and (empty := _empty_layers(lottery, method, number)):
                    listed = choices(empty, 6)
                    _log.warning(
                        "%s, round %d: layers without a weight: %s", method, number, listed
                    )
                frame = pd.DataFrame(rows, columns=[*COLUMNS])
                frame = ticket_table.with_collapse(frame, plan.tolerance)
                results.write_table(frame, out / TABLE)
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The scored rounds of every method, over all subsets and layers."""
    whole = (frame["subset"] == ALL) & (frame["layer"] == ALL)
    return frame.loc[whole & frame["balanced_accuracy"].notna(), SUMMARY]


def table_rows(lottery: Lottery, method: str, number: int) -> list[dict[str, Any]]:
    """The rows of a method and round: from the masks and, at a target sparsity, from the scores."""
    # the single part of imp has the name of the row of all subsets
    names = [part.name for part in lottery.parts(method)]
    masks, per_part = lottery.masks(method, number), lottery.masks_per_part(method)
    of_masks = ticket_table.mask_rows(masks, per_part, names, separate=method == "multi")
    rows = {(row["subset"], row["layer"]): row for row in of_masks}
    whole = rows[ALL, ALL]
    steps = 0 if method == "random" else number * lottery.plan.iterations
    if lottery.rounds[number - lottery.first][1]:
        steps += lottery.passes
        shared = {column: whole[column] for column in ("sparsity", "parameters", "ratio")}
        for row in _scores(lottery, method, number):
            rows.setdefault((row["subset"], ALL), dict(shared)).update(row)
    batches = steps * len(lottery.names) + lottery.plan.rewind
    whole["n_train"] = batches * lottery.recipe.batch_size
    keys = {
        "method": method,
        "by": lottery.plan.by,
        "round": number,
        "seed": lottery.recipe.seed,
    }
    return [keys | row for row in rows.values()]


def _scores(lottery: Lottery, method: str, number: int) -> list[dict[str, Any]]:
    """The scores of each subset and of all, on the test images."""
    subnets = lottery.subnets(method, number)
    labels = torch.from_numpy(lottery.test.labels)
    truth = F.one_hot(labels, len(lottery.test.classes)).bool()
    subset = lottery.partition.of_test
    predicted, named = _predictions(lottery, method, subnets)
    rows = ticket_table.score_rows(predicted, truth, subset, lottery.names)
    rows[-1]["accuracy"] = float((named == labels).double().mean())
    rows[-1]["chance"] = float(truth.double().mean(0).max())
    if method in ("rtl", "random"):
        with_next_mask, _ = _predictions(lottery, method, subnets, shift=1)
        null = ticket_table.score_rows(with_next_mask, truth, subset, lottery.names)
        for row, null_row in zip(rows, null, strict=True):
            row["swapped"] = null_row["balanced_accuracy"]
    return rows


def _predictions(
    lottery: Lottery, method: str, subnets: Sequence[Subnets], shift: int = 0
) -> tuple[Tensor, Tensor]:
    """Whether each test image is predicted to be of each class, ``(n, C)`` bool, and the class that
    is predicted for it, ``(n,)``.

    With `shift` s, subset k has the mask of subset k + s.
    """
    count = len(lottery.parts(method))
    if method == "multi":
        routes = [(model, 0, 0) for model in subnets]
    else:
        routes = [(subnets[0], k, (k + shift) % count) for k in range(count)]
    predictions = routing.predict(routes, lottery.test, lottery.geometry, lottery.device)
    if lottery.by_class and method != "imp":
        return (predictions > 0).T, predictions.argmax(0)
    n = len(lottery.test)
    if len(predictions) > 1:
        route = torch.from_numpy(lottery.partition.of_test)
    else:
        route = torch.zeros(n).long()
    named = predictions[route, torch.arange(n)].long()
    return F.one_hot(named, len(lottery.test.classes)).bool(), named


def _empty_layers(lottery: Lottery, method: str, number: int) -> list[str]:
    """Layers that a mask leaves without a weight, as ``blocks.0.attn.proj for cat``."""
    names = [part.name for part in lottery.parts(method)]
    masks, per_part = lottery.masks(method, number), lottery.masks_per_part(method)
    return ticket_table.empty_layers(masks, per_part, names)
