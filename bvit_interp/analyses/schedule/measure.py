"""Schedules of steps, and decoding and removal of the step.

Ours; not in bViT (arXiv 2605.10661), whose eq. 9 adds a time embedding and whose Fig. 8 runs on
past T. There are three experiments:

- `schedule`: the steps in another order, each with what is its own (its row of the time embedding,
  the refresh of a memory; in a stack its block). `skip` t, `repeat` t twice, `swap` t with t + 1,
  `delay` (steps d + 1..T from z_0), `lag` and `lead` (T steps, each d behind or ahead), `fixed`
  (every step is step t), `mean_embedding` (every step adds the mean row), `reverse`, `twice` (1..T
  twice), `run` (1..S) and `replace` (step s in place of step t). A plain bViT has one function for
  all steps, so only their number matters: to skip any step is to run T - 1 steps, to repeat any
  step is to run T + 1, and a swap changes nothing. In a stack this is the layer swap of Sun et al.
  (2024, "Transformer layers as painters", arXiv 2407.09298). A model with a loop of its own makes
  what each step reads, so its steps stay in their places: it has the rows of `normal`, of `run` to
  at most T, and of `skip` after step 1, unless later steps read more than the state before them;
- `decoding`: a linear discriminant of the step on single tokens, fitted to some images and tested
  on others, from the state (`raw`), from z / ||z|| (`direction`) or from log ||z|| alone (`norm`).
  `pair_accuracy` is a forced choice: which of two states of a token belongs to which step. Null: a
  guess;
- `removal`: after step t the step is removed from the state of every token, and the model runs on.
  `subspace` replaces the component along the differences of the steps' mean states (T - 1
  dimensions) by its mean over the steps; `mean` subtracts only the deviation of the step's own
  mean. Both leave the steps equal means, where no linear decoder beats a constant (Belrose et al.,
  2023, arXiv 2306.03819); `decoding` checks this with a new decoder, fitted to other images. Nulls:
  `random_subspace` of as many dimensions; `random_scaled`, the same with every token moved as far
  as by `subspace` (so past the mean, which harms more); `random_shift`, as far as `mean`.

Cost: for T = 12 a scored image takes 33 forwards of a plain bViT, 69 of a model with a time
embedding or a stack, 72 more for the matrix; any other image takes one. 2400 images of 32 px, 240
of them scored, of three models of width 128 took 411 s on one core. Estimated from the number of
forwards, not measured: 80 s for the default on 1000 images and one bViT, 2 PFLOP on ImageNet.
Expected: none published. A plain bViT can only read its state; a model with a time embedding counts
if wrong rows harm it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from bvit_interp.analyses.schedule import COLUMNS, Config
from bvit_interp.analyses.schedule.experiments import (
    FirstPass,
    HeldOut,
    Labelled,
    Learned,
    SecondPass,
    Subject,
)
from bvit_interp.analyses.schedule.tables import model_rows
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.models.looped import Model
from bvit_interp.models.unroll import for_any_model


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Changed schedules, the decoded step, and runs from states without the step.

    Parameters
    ----------
    models : name -> model; all see each image in the same two passes.
    data : labelled images, at least 6.

    Returns
    -------
    A table of `COLUMNS`; without `replace` for a model whose steps are all the same function, and
    of another model's loop with the schedules of `can_run` alone.
    """
    roles = _roles(len(data), config)
    subjects = {
        name: Subject(model, config.runs, config.shifts, matrix=config.n_matrix > 0)
        for name, model in models.items()
    }
    first = {name: FirstPass(subject) for name, subject in subjects.items()}

    def learn(batch: ModelBatch) -> Learned:
        return subjects[batch.model].learn(_parts(batch, roles, tuple(roles)))

    for name, learned in stream(models, data, config, learn, progress="schedule", labels=True):
        first[name].update(learned)
    fitted = {name: sums.fit(config.ridge, config.seed) for name, sums in first.items()}
    second = {name: SecondPass(subjects[name], fitted[name]) for name in models}

    def test(batch: ModelBatch) -> HeldOut | None:
        parts = _parts(batch, roles, ("test",))
        if "test" not in parts:
            return None
        return subjects[batch.model].test(*parts["test"], fitted[batch.model])

    text = "schedule: held-out images"
    for name, tested in stream(models, data, config, test, progress=text, labels=True):
        if tested is not None:
            second[name].update(tested)
    rows = [
        {"model": name, "trained_steps": subject.trained, **row}
        for name, subject in subjects.items()
        for row in model_rows(subject, first[name], fitted[name], second[name])
    ]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("step", "other_step", "n"), "Int64"))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of the normal and the longer runs, of the decoded step, and of removals half
    way."""
    shown = frame["variant"].isin(["normal", "run", "mean_embedding"])
    shown |= frame["variant"].isin(["raw", "norm"]) & frame["step"].isna()
    half_way = (frame["experiment"] == "removal") & (frame["step"] == frame["trained_steps"] // 2)
    shown |= frame["variant"].isin(["subspace", "random_scaled"]) & half_way
    return frame[shown & (frame["metric"] == "accuracy")].drop(columns="metric")


def _roles(length: int, config: Config) -> dict[str, set[int]]:
    """Positions of the images of each role.

    `fit` and `refit`: decoders are fitted to them, before and after a removal; `test`: scored;
    `matrix`: scored for the matrix too.
    """
    positions = evenly_spaced(length, config.limit)
    n = len(positions)
    if n < 6:
        raise UserError(f"the step is decoded on held-out images: at least 6 are needed, got {n}")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed)).tolist()
    scored = min(config.n_scored, n // 2)
    refit = (scored + 2 * n) // 3
    ends = {
        "matrix": (0, min(config.n_matrix, scored)),
        "test": (0, scored),
        "fit": (scored, refit),
        "refit": (refit, n),
    }
    return {
        role: {positions[i] for i in shuffled[begin:end]} for role, (begin, end) in ends.items()
    }


def _parts(
    batch: ModelBatch, roles: Mapping[str, set[int]], wanted: Sequence[str]
) -> dict[str, Labelled]:
    """Images and labels of the batch for each role that has any."""
    parts = {}
    for role in wanted:
        part = batch.take(torch.tensor([i in roles[role] for i in batch.index.tolist()]))
        if len(part):
            parts[role] = (part.images, part.labels)
    return parts
