"""Circuits over steps: gates chosen on some images and scored on others.

Ours; not in bViT (arXiv 2605.10661), whose section 4.2.3 asks this of weights pruned in training. A
gate for every (step, head) and every (step, group of neighbouring neurons) of the trained model is
open, or closes its unit by ablation. A `fraction` of all T U gates stays open, for heads (site `z`)
and for groups (site `mlp_post`) alike, whatever a unit costs; the number per step is free. Gates
are chosen on `n_fit` images drawn at random and scored on others, by ``KL(whole model || gated
model)`` and accuracy:

- `gradient`: by the mean over images of ``|d log p(own answer) / d gate|`` (Michel et al., 2019;
  attribution patching);
- `learned`: trained for ``KL`` by straight-through gradients, with exactly that many open gates
  (`fit.py`).

The conditions (`conditions.py`) have as many open gates of each site: `per-step`, the circuit;
`all-steps`, the same units at every step; `even`, as many at each step as these, but each step's
own best; `shuffled`, at each step the circuit of another step; `shuffled-units`, each step's own
number of units, but those that another step ranks first. The nulls are random units: `random`, each
step's own number; `even-random`, as many at every step; `same-random`, the same at every step. So
the number of units that a step needs (`shuffled`, `even` against `per-step`) is separated from
which units it needs (`shuffled-units`, `random` against `per-step`; `even-random` against `even`;
`same-random` against `all-steps`). `excess` is the KL above that of the circuit on the same images.

A random circuit is a sample, as an image is. So the interval of a mean over draws covers draws and
images: the variance of the draws' means plus that of the images' means, with Student's t
(`scores.py`; not given for fewer than 3 draws). Each draw has a row of its own (`draw`), with an
interval over images alone. The fit images are not drawn again.

The steps of a stack have weights of their own, and head 0 of two steps is no more alike than heads
0 and 1. There `shuffled-units` and `all-steps` have no meaning; the same holds between the blocks
of a hybrid. In a model with a memory, gates are in a step's own block; its inner updates stay
intact.

The table also has, per step, the share of its gates that stay open (null: open gates are at random
steps), and the Jaccard overlap with the circuits of other steps (null: random gates, as many at
each step). The fit runs on every process, on the same images.

Cost: `draws` * 5 + 4 forwards per image, method and fraction, 176 by default: 128 images of 32 px,
a bViT of width 128 and its ViT, 490 s of one core's time on a busy machine. Computed, not measured:
1000 images of bViT-B are 5 PFLOPs, eight minutes of a GPU at 10 TFLOP/s. Learning takes 8 *
`epochs` + 2 forwards more per fit image and fraction.

Expected: early steps need nearly all units, late steps few. The number of open units matters more
than which ones they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.circuits import COLUMNS, LABELS, Config
from bvit_interp.analyses.circuits.conditions import conditions
from bvit_interp.analyses.circuits.fit import Fit
from bvit_interp.analyses.circuits.gates import Gates
from bvit_interp.analyses.circuits.scores import GateScores, Score
from bvit_interp.analyses.circuits.structure import structure
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.data.stream import ModelBatch, halve_on_oom, stream
from bvit_interp.errors import DataError, UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.looped import Model
from bvit_interp.models.unroll import for_any_model
from bvit_interp.results import Table

_IMAGES_AT_ONCE = 256
_NULL_DRAWS = 200
_KEYS = ("model", "method", "fraction", "condition", "draw", "site", "step")
Result = TypeVar("Result")


@for_any_model
def measure(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    table: Table | None = None,
) -> pd.DataFrame:
    """Circuits of every model, by every method and of every size.

    Parameters
    ----------
    models : name -> model; all see each image in one pass per method and fraction.
    data : labelled images, at least two; labels are used for the accuracy alone.
    table : rows that it has are not measured again; finished rows are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    for model in models.values():
        # refuses classes that do not match before hours of work
        label_map(data, model, config.classes)
    gates = {name: Gates(model, config.groups) for name, model in models.items()}
    fit_positions = _fit_positions(data, config)
    fits: dict[str, Fit] = {}
    rows = _stored_rows(table)
    stored = {_key(row) for row in rows}
    fractions = sorted(set(config.fractions), reverse=True)
    for method, fraction in itertools.product(config.methods, fractions):
        keys = {"method": method, "fraction": fraction}
        chosen = {
            name: model
            for name, model in models.items()
            if _key({"model": name, **keys, **_last_row(gates[name])}) not in stored
        }
        if not chosen:
            continue
        fits = fits or _fits(models, gates, data, fit_positions, config)
        masks = {
            name: conditions(fits[name], method, fraction, config.epochs, config.draws, config.seed)
            for name in chosen
        }
        scores = _score(chosen, fits, masks, data, fit_positions, config)
        for name in chosen:
            for values in _rows(scores[name], masks[name], fits[name], config):
                row = {**dict.fromkeys(COLUMNS, math.nan), "model": name, **keys, **values}
                if _key(row) in stored:  # a killed run may have written some of them
                    continue
                stored.add(_key(row))
                rows.append(row)
                if table is not None:
                    table.append(row)
    return pd.DataFrame(rows)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """KL by condition, and the excess of circuits shuffled over steps."""
    means = (frame["step"] == "all") & (frame["draw"] == "all")
    whole = frame[means & (frame["condition"] != "full")]
    keys = ["model", "method", "fraction"]
    kl = whole.pivot(index=keys, columns="condition", values="kl")[list(LABELS)]
    shuffled = whole[whole["condition"] == "shuffled"].set_index(keys)
    excess = shuffled[["excess", "excess_low", "excess_high"]].add_prefix("shuffled_")
    return kl.join(excess).reindex(shuffled.index).reset_index()


def _stored_rows(table: Table | None) -> list[dict[str, Any]]:
    """Rows of an earlier run, with steps and draws as text."""
    if table is None:
        return []
    table.has(**dict.fromkeys(_KEYS))  # refuses a table with other columns
    return [row | {key: str(row[key]) for key in ("draw", "step")} for row in table.rows]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in _KEYS)


def _last_row(gates: Gates) -> dict[str, str]:
    """Keys of the row that a model's unit ends with."""
    return {
        "condition": "per-step",
        "draw": "all",
        "site": "mlp_post",
        "step": str(gates.steps),
    }


def _fit_positions(data: Samples, config: Config) -> list[int]:
    """Positions of the fit images, in random order; first of those that `limit` leaves out."""
    if len(data) < 2:
        raise UserError(
            "gates are chosen on some images and scored on others: at least 2 are needed, got"
            f" {len(data)}"
        )
    scored = set(evenly_spaced(len(data), config.limit))
    drawn = np.random.default_rng(config.seed).permutation(len(data)).tolist()
    return sorted(drawn, key=scored.__contains__)[: min(config.n_fit, len(data) // 2)]


def _fits(
    models: Mapping[str, Model],
    gates: Mapping[str, Gates],
    data: Samples,
    positions: Sequence[int],
    config: Config,
) -> dict[str, Fit]:
    """Every model's fit; on every process, on the same images."""
    geometries = {name: Geometry.of(model, data, config.resize) for name, model in models.items()}
    batches = _fit_batches(data, positions, set(geometries.values()), config.skip_corrupt)
    fits = {}
    for name in models:
        batch = batches[geometries[name]]
        mean = config.ablation == "mean"
        fits[name] = Fit(gates[name], batch.images, mean, split=_split_on_oom(batch))
    return fits


def _fit_batches(
    data: Samples, positions: Sequence[int], geometries: set[Geometry], skip_corrupt: bool
) -> dict[Geometry, ModelBatch]:
    """All fit images that can be read, on the CPU; `index` counts them from 0."""
    views: dict[Geometry, list[Tensor]] = {geometry: [] for geometry in geometries}
    names, labels = [], []
    for position in positions:
        try:
            image, label, _ = data.read(position)
        except DataError:
            if not skip_corrupt:
                raise
            continue
        names.append(data.name(position))
        labels.append(label)
        for geometry, images in views.items():
            images.append(geometry(image, None)[0])
    if not names:
        raise DataError("none of the images that gates are chosen on can be read")
    return {
        geometry: ModelBatch(
            model="",
            index=torch.arange(len(names)),
            names=tuple(names),
            geometry=geometry,
            images=torch.stack(images),
            masks=None,
            data_labels=torch.tensor(labels),
        )
        for geometry, images in views.items()
    }


def _split_on_oom(
    batch: ModelBatch,
) -> Callable[[Callable[[Tensor], Result], Tensor], list[Result]]:
    """Computes on rows of the fit images, on halves of them where GPU memory does not suffice."""

    def split(compute: Callable[[Tensor], Result], rows: Tensor) -> list[Result]:
        def of_part(part: ModelBatch) -> Result:
            return compute(part.index)

        return halve_on_oom(of_part, batch.take(rows))

    return split


def _score(
    models: Mapping[str, Model],
    fits: Mapping[str, Fit],
    masks: Mapping[str, Mapping[str, Tensor]],
    data: Samples,
    fit_positions: Sequence[int],
    config: Config,
) -> dict[str, dict[str, Any]]:
    """Scores of each model under its gates, in one pass over the images that are not fit images."""
    scores = {
        name: GateScores(
            model.num_classes,
            {condition: len(variants) for condition, variants in masks[name].items()},
            fits[name].gates.device,
        )
        for name, model in models.items()
    }

    def answers(batch: ModelBatch) -> tuple[Tensor, Tensor, Tensor] | None:
        scored = batch.take(~torch.isin(batch.index, torch.tensor(fit_positions)))
        if not len(scored):
            return None
        gates = fits[batch.model].gates
        keep = torch.cat([*masks[batch.model].values()]).to(scored.images)
        at_once = max(1, _IMAGES_AT_ONCE // len(scored))
        gated = [gates.logits(scored.images, variants) for variants in keep.split(at_once)]
        return gates.probe(scored.images), torch.cat(gated), scored.labels

    for name, found in stream(models, data, config, answers, progress="circuits", labels=True):
        if found is not None:
            scores[name].update(*found)
    return {name: of_model.compute() for name, of_model in scores.items()}


def _rows(
    scores: Mapping[str, Any], masks: Mapping[str, Tensor], fit: Fit, config: Config
) -> Iterator[dict[str, Any]]:
    """Rows of one model at one method and fraction: the whole model, the conditions, the steps."""
    whole = scores["whole"]
    everything = {"site": "all", "step": "all", "n": whole["n"], "chance": whole["chance"]}
    low, high = wilson_interval(whole["accuracy"] * whole["n"], whole["n"])
    yield {
        **everything,
        "method": "none",
        "fraction": 1.0,
        "condition": "full",
        "draw": "all",
        "kl": 0.0,
        "accuracy": whole["accuracy"],
        "low": low,
        "high": high,
        "agreement": 1.0,
    }
    for condition in masks:
        draws = scores["draws"].get(condition, [])
        by_draw = {str(d): measured for d, measured in enumerate(draws, start=1)}
        for draw, measured in {"all": scores["conditions"][condition], **by_draw}.items():
            row = {**everything, "condition": condition, "draw": draw, **_score_columns(measured)}
            if condition == "per-step":
                row |= dict.fromkeys(("excess", "excess_low", "excess_high"), math.nan)
            yield row
    for site, units in fit.gates.sites.items():
        circuit = masks["per-step"][0][:, units]
        columns = structure(circuit, _NULL_DRAWS, config.seed)
        for t, gates in enumerate(circuit.tolist()):
            yield {
                "condition": "per-step",
                "draw": "all",
                "site": site,
                "step": str(t + 1),
                "n": fit.count,
                **{key: float(values[t]) for key, values in columns.items()},
                "gates": "".join(".#"[is_open] for is_open in gates),
            }


def _score_columns(measured: Mapping[str, Score]) -> dict[str, float]:
    """Columns of the scores of a condition, or of one draw of it."""
    accuracy = measured["accuracy"]
    columns = {"accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"]}
    for name in ("kl", "excess"):
        columns[name] = measured[name]["value"]
        columns |= {f"{name}_{end}": measured[name][end] for end in ("low", "high")}
    return columns | {"agreement": measured["agreement"]["value"]}
