"""Rows of the table of `schedule`, from the results of its experiments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from bvit_interp.analyses.schedule.experiments import (
    Decoder,
    FirstPass,
    Fitted,
    SecondPass,
    Subject,
)
from bvit_interp.analyses.schedule.outcomes import Outcomes
from bvit_interp.analyses.schedule.schedules import Plan, Run, time_embedding
from bvit_interp.analyses.schedule.step_removal import REMOVALS
from bvit_interp.metrics.streaming.means import MeanCI


def model_rows(
    subject: Subject, learned: FirstPass, fitted: Fitted, tested: SecondPass
) -> Iterator[dict[str, Any]]:
    """All rows of a model; every process takes part."""
    removals = [Run(name, t) for t in range(1, subject.trained + 1) for name in REMOVALS]
    yield from _outcome_rows("schedule", _runs(subject.plans), learned.outcomes)
    yield from _outcome_rows("schedule", _runs(subject.matrix), learned.matrix)
    yield from _outcome_rows("removal", removals, tested.outcomes)
    distances = tested.distance.compute()
    for i, run in enumerate(removals):
        columns = {key: values[i].item() for key, values in distances.items()}
        yield {"experiment": "removal", **run._asdict(), "metric": "distance", **columns}
    yield from _embedding_rows(subject, fitted.norms)
    yield from _decoding_rows(subject.trained, tested.scores)


def _runs(plans: list[Plan]) -> list[Run]:
    return [run for plan in plans for run in plan.runs]


def _outcome_rows(experiment: str, runs: list[Run], outcomes: Outcomes) -> Iterator[dict[str, Any]]:
    for metric, by_run in (outcomes.compute() if runs else {}).items():
        for run, columns in zip(runs, by_run, strict=True):
            yield {"experiment": experiment, **run._asdict(), "metric": metric, **columns}


def _embedding_rows(subject: Subject, norms: Mapping[str, list[float]]) -> Iterator[dict[str, Any]]:
    """Length of each row of the time embedding, relative to the norm of the state."""
    table = time_embedding(subject.view)
    lengths = [] if table is None else table.detach().double().norm(dim=1).tolist()
    for kind, by_step in norms.items():
        for t, (length, norm) in enumerate(zip(lengths, by_step, strict=False), start=1):
            yield {
                "experiment": "schedule",
                "variant": "embedding",
                "tokens": kind,
                "step": t,
                "metric": "length",
                "value": length / norm,
            }


def _decoding_rows(trained: int, scores: Mapping[Decoder, MeanCI]) -> Iterator[dict[str, Any]]:
    nulls = {
        "accuracy": 1 / trained,
        "step_error": trained**2 // 4 / trained,  # of always the middle step
        "pair_accuracy": 0.5,
    }
    for (kind, name), mean in scores.items():
        columns = mean.compute()
        for i, (j, metric) in itertools.product(range(trained + 1), enumerate(nulls)):
            yield {
                "experiment": "decoding",
                "variant": name,
                "tokens": kind,
                "step": i + 1 if i < trained else None,
                "metric": metric,
                **{key: values[i, j].item() for key, values in columns.items()},
                "null": nulls[metric],
            }
