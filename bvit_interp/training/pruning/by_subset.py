"""Tickets for parts of the data: which weights does each class, cluster or environment need, all in
one tensor?

Routing the Lottery (arXiv 2601.22141). Extraction (Algorithm 1): for every subset the model is
trained from its first weights under the subset's mask on the subset's images, the smallest of the
remaining weights go, and the weights are reset, until the target sparsity. Retraining (Algorithm 2,
`routing.py`): the subnetworks are trained together in one dense tensor. Test images are routed by
their known subset; subnetworks of classes answer one-vs-rest, each for all images. Beside it, the
paper's baselines, trained on as many images: ``imp``, one mask and model for all (Frankle & Carbin
2019, arXiv 1803.03635), and ``multi``, a model a subset; its masks are those of rtl, whose
extraction is, subset by subset, the same. Ours: ``random``, rtl with masks drawn at random; subsets
(class, step) of a bViT, for which the steps are untied while masks are sought, so that each step's
weights tell what that step needs; pruning in equal ratios, of at most `rate` a round, so that every
target is met; and, if asked for, first weights that have been trained a little (`rewind`), from
which a run of minutes finds masks that differ.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from bvit_interp import results
from bvit_interp.errors import choices
from bvit_interp.training.loop.recipe import Recipe
from bvit_interp.training.pruning import ticket_table
from bvit_interp.training.pruning.lottery import TABLE, Lottery
from bvit_interp.training.pruning.ticket_plan import TicketPlan

_log = logging.getLogger(__name__)
COLUMNS = ticket_table.COLUMNS
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


def run(
    recipe: Recipe, tickets: TicketPlan, out: Path, device: str = "cpu", *, overwrite: bool = False
) -> pd.DataFrame:
    """Find and train the tickets, or go on where this stopped, and return the table, rows of
    `COLUMNS`.

    Parameters
    ----------
    recipe : model, data (`images_per_epoch` of its training images take part), optimiser and
        augmentation; any timm model with one classifier.
    tickets : of what, how far and beside what.
    out : folder of ``tickets.csv``, ``trainings.csv`` (a row a finished training), ``subsets.csv``
        (which image belongs where), ``extraction/`` (masks of each subset and round) and
        ``subnets/METHOD/round-NN/NN/``: the weights and masks of each model.
    device : of this process.
    overwrite : start again.

    Raises
    ------
    UserError
        A subset without images, a single subset, a sparsity that leaves nothing, a folder of other
        options.
    """
    results.check_folder(out)
    lottery = Lottery(recipe, tickets, out, device, overwrite)
    rows = results.read_table(out / TABLE).to_dict("records") if (out / TABLE).exists() else []
    with lottery.bar:
        for number in range(lottery.first, lottery.first + len(lottery.rounds)):
            for method in tickets.methods:
                done = any(row["method"] == method and row["round"] == number for row in rows)
                lottery.bar.set_postfix_str(f"{method} round {number}")
                rows += [] if done else lottery.rows(method, number)
                if not done and (empty := lottery.emptied(method, number)):
                    _log.warning(
                        "%s, round %d: layers without a weight: %s",
                        method,
                        number,
                        choices(empty, 6),
                    )
                frame = ticket_table.with_collapse(
                    pd.DataFrame(rows, columns=[*COLUMNS]), tickets.tolerance
                )
                results.write_table(frame, out / TABLE)
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The scored rounds of every method, over all subsets and layers."""
    whole = (frame["subset"] == ticket_table.ALL) & (frame["layer"] == ticket_table.ALL)
    return frame.loc[whole & frame["balanced_accuracy"].notna(), SUMMARY]
