"""How much accuracy is left when the FFN's weights are cut to rank k?

Fig. 7, section 4.1.3 and Appendix A.2 of bViT (arXiv 2605.10661): both FFN matrices of every block
are replaced by their truncated SVD, ``W_k = U_k S_k V_k^T``, biases untouched, nothing retrained.
Ranks are the paper's (64 to 768 at width 768), in proportion for other widths; at full rank the
weights themselves are used, so the accuracy is the model's own. The null is `chance`, the share of
the most frequent class among the images.

Ours, not the paper's: `--methods whitened` keeps the k directions in which the outputs of real
inputs x live, least ``E||W x - W_k x||^2`` (SVD-LLM, Wang et al., 2024, arXiv 2403.07378), which
tells a collapse that lies in the weights from one that lies in where they are used; `random` keeps
k random directions, the null of both (`probes/truncation.py`). E is over all tokens of calibration
images in the uncut model, and over the steps that share the weight. `--blocks each` cuts one step
at a time, the others whole: at which step does low rank hurt? The inner updates of a memory belong
to their step.

Cost: one forward an image, rank and method, and with `each` step; full rank once. By default three
models of width 128 and 300 images of 32 px take a minute on one core. Rows are written as they
finish and the sweep continues where it stopped. Expected: in the paper bViT collapses below rank
600 or so, ViT later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.rank_sweep import COLUMNS, Config, Method
from bvit_interp.analyses.rank_sweep.low_rank import (
    InputMoments,
    Matrix,
    TruncatedFFN,
    watch_inputs,
)
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples, Subset, spread
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.results import Table

PAPER_RANKS = (64, 128, 256, 384, 512, 640, 702, 744, 760, 768)


PAPER_WIDTH = 768


class _Unit(NamedTuple):
    """What a row is about, beside its model."""

    method: Method
    step: str
    rank: int


_Counts = tuple[int, int, float]
"""Hits, images and chance."""


def measure(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    table: Table | None = None,
) -> pd.DataFrame:
    """Accuracy of every model at every rank.

    Parameters
    ----------
    models : name -> model; all see each image in one pass. Their weights are not written.
    data : labelled images.
    table : rows already there are not measured again; finished ones are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    classes = {name: label_map(data, model) for name, model in models.items()}
    ffns = {
        name: TruncatedFFN(model, config.blocks == "each", config.seed)
        for name, model in models.items()
    }
    units = {name: _units(name, ffn, config) for name, ffn in ffns.items()}
    calibration, scored = _calibration(data, config)
    for row in [] if table is None else table.rows:
        row["step"] = str(row.get("step"))  # a CSV without "all" reads as numbers
    rows: list[dict[str, Any]] = []
    whole: dict[str, _Counts] = {}  # at full rank a unit is the model itself: counted once
    for of_models in itertools.zip_longest(*units.values()):
        chosen = {
            name: unit
            for name, unit in zip(models, of_models, strict=True)
            if unit is not None
            and not (table is not None and table.has(model=name, **unit._asdict()))
        }
        if chosen and len(calibration) and not any(ffn.moments for ffn in ffns.values()):
            _take_moments(models, ffns, calibration, config)
        new = {
            name: unit
            for name, unit in chosen.items()
            if not (unit.rank == ffns[name].full_rank and name in whole)
        }
        counts = {**whole, **(_count_hits(models, new, ffns, classes, data, config) if new else {})}
        whole |= {
            name: counts[name] for name, unit in chosen.items() if unit.rank == ffns[name].full_rank
        }
        for name, unit in chosen.items():
            rows.append(_row(name, unit, ffns[name], len(calibration), scored, *counts[name]))
            if table is not None:
                table.append(rows[-1])
    return pd.DataFrame(rows if table is None else table.rows)[list(COLUMNS)]


def _units(name: str, ffn: TruncatedFFN, config: Config) -> list[_Unit]:
    """The rows to measure of a model, in order."""
    return [
        _Unit(*unit)
        for unit in itertools.product(
            config.methods, ffn.steps, _ranks(name, ffn.full_rank, config)
        )
    ]


def _ranks(name: str, full: int, config: Config) -> list[int]:
    if config.ranks is None:
        return sorted({max(round(rank * full / PAPER_WIDTH), 1) for rank in PAPER_RANKS})
    if max(config.ranks) > full:
        raise UserError(
            f"rank {max(config.ranks)} is above the full rank {full} of {name}; ranks: 1..{full}"
        )
    return sorted(set(config.ranks))


def _calibration(data: Samples, config: Config) -> tuple[Subset, float]:
    """Images for the second moments, spread evenly over those that are not scored, or, where these
    are too few, over all; and the share of them that are also scored."""
    scored = set(spread(len(data), config.limit))
    others = [i for i in range(len(data)) if i not in scored]
    pool = others if len(others) >= config.calibration_images else range(len(data))
    places = (
        [pool[i] for i in spread(len(pool), config.calibration_images)]
        if config.calibration_images
        else []
    )
    return Subset(data, places), len(scored & set(places)) / max(len(places), 1)


def _take_moments(
    models: Mapping[str, VisionTransformer],
    ffns: Mapping[str, TruncatedFFN],
    calibration: Subset,
    config: Config,
) -> None:
    """Second moments of what every weight reads in the uncut models, in one pass."""
    metrics = {name: InputMoments(ffn.matrices).to(ffn.device) for name, ffn in ffns.items()}
    loader, geometries = replace(config, limit=None).loader(
        calibration, models, "rank-sweep calibration"
    )
    for batch in loader:
        for name, ffn in ffns.items():

            def run(part: Any, name: str = name, ffn: TruncatedFFN = ffn) -> Any:
                with torch.inference_mode(), watch_inputs(ffn.matrices) as found:
                    ffn.view(part.views[geometries[name]][0].to(ffn.device))
                return found

            for found in run_in_halves(run, batch):
                metrics[name].update(found)
    for name, ffn in ffns.items():
        ffn.moments = metrics[name].compute()


def _count_hits(
    models: Mapping[str, VisionTransformer],
    chosen: Mapping[str, _Unit],
    ffns: Mapping[str, TruncatedFFN],
    classes: Mapping[str, Tensor],
    data: Samples,
    config: Config,
) -> dict[str, _Counts]:
    """Hits, images and chance of each model at its unit, in one pass over the images."""
    rows = {name: PerImage() for name in chosen}
    told = dict.fromkeys(
        f"{unit.method} step={unit.step} k={unit.rank}" for unit in chosen.values()
    )
    loader, geometries = config.loader(
        data, {name: models[name] for name in chosen}, f"rank-sweep {', '.join(told)}"
    )
    with ExitStack() as stack, torch.inference_mode():
        for name, unit in chosen.items():
            stack.enter_context(ffns[name].cut(*unit))
        for batch in loader:
            for name in chosen:

                def run(
                    part: Any, name: str = name, ffn: TruncatedFFN = ffns[name]
                ) -> tuple[Tensor, Tensor]:
                    predicted = (
                        ffn.view(part.views[geometries[name]][0].to(ffn.device)).argmax(-1).cpu()
                    )
                    wanted = classes[name][part.labels]
                    return part.index, torch.stack([predicted == wanted, wanted], dim=1)

                for index, row in run_in_halves(run, batch):
                    rows[name].update(index, row)
    counts = {}
    for name in chosen:
        hits, labels = rows[name].compute()[1].unbind(1)
        counts[name] = (int(hits.sum()), len(hits), int(labels.long().bincount().max()) / len(hits))
    return counts


def _row(
    name: str,
    unit: _Unit,
    ffn: TruncatedFFN,
    calibration_images: int,
    scored: float,
    hits: int,
    n: int,
    chance: float,
) -> dict[str, Any]:
    low, high = wilson_interval(hits, n)
    factors = ffn.factors(unit.method, unit.step)
    energy = {m: found.energy(unit.rank) for m, found in factors.items()}
    error = {
        m: found.error(unit.rank, ffn.moments[m])
        for m, found in factors.items()
        if m in ffn.moments
    }
    return {
        "model": name,
        **unit._asdict(),
        "share": unit.rank / ffn.full_rank,
        "accuracy": hits / n,
        "low": low,
        "high": high,
        "n": n,
        "energy_fc1": _mean(energy, "fc1"),
        "energy_fc2": _mean(energy, "fc2"),
        "error_fc1": _mean(error, "fc1"),
        "error_fc2": _mean(error, "fc2"),
        "calibration_images": calibration_images,
        "calibration_scored": scored,
        "chance": chance,
    }


def _mean(values: Mapping[Matrix, float], which: str) -> float:
    """Mean over the weights called `which`; nan of none."""
    listed = [value for matrix, value in values.items() if matrix.name == which]
    return sum(listed) / len(listed) if listed else math.nan


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All of it."""
    return frame
