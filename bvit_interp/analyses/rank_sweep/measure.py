"""Accuracy of models whose FFN weights are cut to rank k.

Fig. 7, section 4.1.3 and Appendix A.2 of bViT (arXiv 2605.10661). Both FFN matrices of every block
are replaced by their truncated SVD, ``W_k = U_k S_k V_k^T``. Biases stay, and nothing is retrained.
Ranks are the paper's (64 to 768 at width 768), in proportion for other widths. At full rank the
weights themselves are used, so the accuracy is the model's own. The null is `chance`, the share of
the most frequent class among the images.

Ours, not the paper's: `--methods whitened` keeps the k directions in which the outputs of real
inputs x lie, with the least ``E||W x - W_k x||^2`` (SVD-LLM, Wang et al., 2024, arXiv 2403.07378).
It separates a collapse that lies in the weights from one that lies in where they are used. `random`
keeps k random directions, the null of both (`factors.py`). E is over all tokens of calibration
images in the uncut model, and over the steps that share the weight. `--blocks each` cuts one step
at a time while the others stay whole: at which step does a low rank hurt? Inner updates of a memory
belong to their step.

Cost: one forward per image, rank and method; with `each` also per step. Full rank is run once. By
default three models of width 128 and 300 images of 32 px take a minute on one core. Rows are
written as they finish, and a sweep continues where it stopped. Expected: in the paper bViT
collapses below a rank of about 600, ViT later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.rank_sweep import ALL_STEPS, COLUMNS, Config, Method
from bvit_interp.analyses.rank_sweep.input_moments import InputMoments, InputSums, watch_inputs
from bvit_interp.analyses.rank_sweep.low_rank import Matrix, Truncation, ffn_matrices
from bvit_interp.data.labels import label_map
from bvit_interp.data.samples import Samples, Subset, evenly_spaced
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model, unroll
from bvit_interp.results import Table

PAPER_RANKS = (64, 128, 256, 384, 512, 640, 702, 744, 760, 768)
PAPER_WIDTH = 768


@for_any_model
def measure(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    table: Table | None = None,
) -> pd.DataFrame:
    """Accuracy of every model at every rank.

    Parameters
    ----------
    models : name -> model; all see each image in one pass. Their weights are not written.
    data : labelled images.
    table : rows that are already there are not measured again; finished ones are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    for model in models.values():
        # classes that do not match are refused before any pass
        label_map(data, model, config.classes)
    subjects = {name: _Subject.of(model, config) for name, model in models.items()}
    plans = [_cuts(name, subject, config) for name, subject in subjects.items()]
    rounds = [
        {
            name: cut
            for name, cut in zip(models, cuts, strict=True)
            if cut is not None and not _is_finished(table, name, cut)
        }
        for cuts in itertools.zip_longest(*plans)
    ]
    calibration, scored_share = _calibration(data, config)
    moments: dict[str, dict[Matrix, Tensor]] = {name: {} for name in models}
    if any(rounds) and len(calibration):
        moments = _moments(models, subjects, calibration, config)
    truncations = {
        name: Truncation(subject.matrices, moments[name], config.seed)
        for name, subject in subjects.items()
    }
    rows: list[dict[str, Any]] = []
    whole: dict[str, _Hits] = {}  # at full rank a cut is the model itself, which is scored once
    for cuts in rounds:
        pending = {
            name: cut
            for name, cut in cuts.items()
            if not (cut.rank == subjects[name].full_rank and name in whole)
        }
        hits = dict(whole)
        if pending:
            hits |= _count_hits(models, pending, subjects, truncations, data, config)
        for name, cut in cuts.items():
            if cut.rank == subjects[name].full_rank:
                whole[name] = hits[name]
            row = {
                "model": name,
                **cut._asdict(),
                "share": cut.rank / subjects[name].full_rank,
                **_accuracy(hits[name]),
                **_losses(truncations[name], cut),
                "n_calibration": len(calibration),
                "calibration_scored": scored_share,
            }
            rows.append(row)
            if table is not None:
                table.append(row)
    frame = pd.DataFrame(rows if table is None else table.rows)
    return frame.astype({"step": str})[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All of it."""
    return frame


class _Cut(NamedTuple):
    """What a row is about, apart from its model."""

    method: Method
    step: str
    rank: int


class _Hits(NamedTuple):
    """How a model scored."""

    right: int
    images: int
    chance: float


class _Subject(NamedTuple):
    """A model and the weights that are cut."""

    unrolled: Model
    matrices: dict[str, list[Matrix]]
    full_rank: int

    @classmethod
    def of(cls, model: Model, config: Config) -> _Subject:
        """All steps together, or each step by itself."""
        unrolled = unroll(model)
        if config.blocks == "each":
            steps = range(1, len(unrolled.blocks) + 1)
            matrices = {str(step): ffn_matrices(unrolled, step) for step in steps}
        else:
            matrices = {ALL_STEPS: ffn_matrices(unrolled)}
        ranks = [min(matrix.weight.shape) for of_step in matrices.values() for matrix in of_step]
        return cls(unrolled, matrices, min(ranks))

    @property
    def all_matrices(self) -> list[Matrix]:
        """The weights of every step."""
        return [matrix for of_step in self.matrices.values() for matrix in of_step]


def _cuts(name: str, subject: _Subject, config: Config) -> list[_Cut]:
    """The rows to measure of a model, in order."""
    ranks = _ranks(name, subject.full_rank, config)
    return [_Cut(*cut) for cut in itertools.product(config.methods, subject.matrices, ranks)]


def _ranks(name: str, full: int, config: Config) -> list[int]:
    if config.ranks is None:
        return sorted({max(round(rank * full / PAPER_WIDTH), 1) for rank in PAPER_RANKS})
    if max(config.ranks) > full:
        raise UserError(
            f"rank {max(config.ranks)} is above the full rank {full} of {name}; ranks: 1..{full}"
        )
    return sorted(set(config.ranks))


def _is_finished(table: Table | None, name: str, cut: _Cut) -> bool:
    if table is None:
        return False
    # a CSV in which no step is "all" is read back with numbers as steps
    steps: list[str | int] = [cut.step] if cut.step == ALL_STEPS else [cut.step, int(cut.step)]
    return any(table.has(model=name, method=cut.method, step=step, rank=cut.rank) for step in steps)


def _calibration(data: Samples, config: Config) -> tuple[Subset, float]:
    """Images for the second moments, and the share of them that are also scored.

    They are evenly spaced over the images that are not scored, or over all images where those are
    too few.
    """
    if not config.n_calibration:
        return Subset(data, []), 0.0
    scored = set(evenly_spaced(len(data), config.limit))
    others: Sequence[int] = [i for i in range(len(data)) if i not in scored]
    pool = others if len(others) >= config.n_calibration else range(len(data))
    chosen = [pool[i] for i in evenly_spaced(len(pool), config.n_calibration)]
    return Subset(data, chosen), len(scored & set(chosen)) / len(chosen)


def _moments(
    models: Mapping[str, Model],
    subjects: Mapping[str, _Subject],
    calibration: Subset,
    config: Config,
) -> dict[str, dict[Matrix, Tensor]]:
    """Second moments of what every weight reads in the uncut models, in one pass."""
    metrics = {
        name: InputMoments(subject.all_matrices).to(device_of(subject.unrolled))
        for name, subject in subjects.items()
    }

    def sums(batch: ModelBatch) -> InputSums:
        subject = subjects[batch.model]
        with watch_inputs(subject.all_matrices) as found:
            subject.unrolled(batch.images)
        return found

    options = replace(config, limit=None)
    for name, found in stream(
        models, calibration, options, sums, progress="rank-sweep calibration"
    ):
        metrics[name].update(found)
    return {name: metric.compute() for name, metric in metrics.items()}


def _count_hits(
    models: Mapping[str, Model],
    cuts: Mapping[str, _Cut],
    subjects: Mapping[str, _Subject],
    truncations: Mapping[str, Truncation],
    data: Samples,
    config: Config,
) -> dict[str, _Hits]:
    """How each model scores with its cut, in one pass over the images."""
    per_image = {name: PerImage() for name in cuts}
    labels = dict.fromkeys(f"{cut.method} step={cut.step} k={cut.rank}" for cut in cuts.values())
    progress = f"rank-sweep {', '.join(labels)}"

    def score(batch: ModelBatch) -> tuple[Tensor, Tensor]:
        predicted = subjects[batch.model].unrolled(batch.images).argmax(-1)
        rows = torch.stack([predicted == batch.labels, batch.labels], dim=1)
        return batch.index, rows.cpu()

    with ExitStack() as stack:
        for name, cut in cuts.items():
            stack.enter_context(truncations[name].cut(*cut))
        chosen = {name: models[name] for name in cuts}
        for name, (index, rows) in stream(
            chosen, data, config, score, progress=progress, labels=True
        ):
            per_image[name].update(index, rows)
    hits = {}
    for name, metric in per_image.items():
        right, label = metric.compute()[1].unbind(1)
        most_frequent = int(label.long().bincount().max())
        hits[name] = _Hits(int(right.sum()), len(right), most_frequent / len(right))
    return hits


def _accuracy(hits: _Hits) -> dict[str, float]:
    low, high = wilson_interval(hits.right, hits.images)
    accuracy = hits.right / hits.images
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "n": hits.images,
        "chance": hits.chance,
    }


def _losses(truncation: Truncation, cut: _Cut) -> dict[str, float]:
    """Energy kept and error of the output, each a mean over the distinct weights."""
    losses: dict[str, float] = {}
    factors = truncation.factors(cut.method, cut.step)
    for name in ("fc1", "fc2"):
        chosen = {matrix: kept for matrix, kept in factors.items() if matrix.name == name}
        losses[f"energy_{name}"] = _mean([kept.energy(cut.rank) for kept in chosen.values()])
        losses[f"error_{name}"] = _mean(
            [
                kept.error(cut.rank, truncation.moments[matrix])
                for matrix, kept in chosen.items()
                if matrix in truncation.moments
            ]
        )
    return losses


def _mean(values: Sequence[float]) -> float:
    """The mean; nan of no values."""
    return sum(values) / len(values) if values else math.nan
