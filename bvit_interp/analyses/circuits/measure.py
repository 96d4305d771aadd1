"""Which heads and neurons does each step need, and would one circuit do for all steps?

Ours; not in bViT (arXiv 2605.10661), whose section 4.2.3 asks it of weights pruned in training. A
gate for every (step, head) and (step, group of neighbouring neurons) of the trained model is open,
or closes its unit by ablation. Of heads and of groups alike a `fraction` of all T U gates stays
open, whatever a unit costs; at which steps is free. Gates are chosen on `fit_images` drawn at
random and judged on others, by ``KL(whole model || gated model)`` and accuracy:

- `gradient`: by the mean over images of ``|d log p(own answer) / d gate|`` (Michel et al., 2019;
  attribution patching);
- `learned`: trained for ``KL`` by straight-through gradients, exactly that many open
  (`probes/circuit.py`).

Conditions, all with as many open gates of each kind: `per-step`, the circuit; `all-steps`, the same
units at every step; `even`, as many at each step as these, but its own best; `shuffled`, the
circuit of another step at each step; `shuffled-units`, each step's own number of units, but those
that another step ranks first. Nulls are random units: `random`, each step's own number;
`even-random`, as many at every step; `same-random`, the same at every step. So how many units a
step needs (`shuffled`, `even` against `per-step`) is told from which (`shuffled-units`, `random`
against `per-step`; `even-random` against `even`; `same-random` against `all-steps`). `excess` is KL
above the circuit's on the same images; its interval is over images, `kl_least` and `kl_most` are
over draws. Steps of a stack have weights of their own, head 0 of two steps is no more alike than
heads 0 and 1: there `shuffled-units` and `all-steps` mean nothing, and so between the blocks of a
hybrid. With a memory, gates are in a step's own block; its inner updates stay whole.

Beside it, per step: the share of its gates that stay open (null: open gates lie anywhere), and the
Jaccard overlap with other steps' circuits (null: random gates, as many at each step). The fit runs
on every process, on the same images.

Cost: `draws` * 5 + 4 forwards an image, method and fraction, 56 by default: 128 images of 32 px, a
bViT of width 128 and its ViT, 86 s on one core (AMD EPYC). Computed, not measured: 1000 images of
bViT-B are 1.6 PFLOPs, three minutes of a GPU at 10 TFLOP/s. Learning takes 8 * `epochs` + 2
forwards a fit image and fraction more. Expected: early steps need nearly all units, late ones few;
which ones stay open matters less than how many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.circuits import COLUMNS, LABELS, Config
from bvit_interp.analyses.circuits.gates import Fit, Gates, Judged, conditions, structure
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.samples import Samples, spread
from bvit_interp.errors import DataError, UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.results import Table

_FIT_BATCH = 32


_IMAGES_AT_ONCE = 256


_NULL_DRAWS = 200


_KEYS = ("model", "method", "fraction", "condition", "kind", "step")


def measure(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    table: Table | None = None,
) -> pd.DataFrame:
    """Circuits of every model, by every method and of every size.

    Parameters
    ----------
    models : name -> model; all see each image in one pass a method and fraction.
    data : labelled images, at least two; labels are used for the accuracy alone.
    table : rows already there are not measured again; finished ones are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    classes = {name: label_map(data, model) for name, model in models.items()}
    gates = {name: Gates(model, config.groups) for name, model in models.items()}
    places = _fit_places(data, config)
    fits: dict[str, Fit] = {}
    rows: list[dict[str, Any]] = [] if table is None else table.rows
    for row in rows:
        row["step"] = str(row["step"])
    for method, fraction in itertools.product(
        config.methods, sorted(set(config.fractions), reverse=True)
    ):
        unit = {"method": method, "fraction": fraction}
        last = {name: {"kind": "neuron", "step": str(of.steps)} for name, of in gates.items()}
        chosen = [
            name
            for name in models
            if table is None or not table.has(model=name, **unit, **last[name])
        ]
        if not chosen:
            continue
        fits = fits or _fits(models, gates, data, places, config)
        masks = {
            name: conditions(fits[name], method, fraction, config.epochs, config.draws, config.seed)
            for name in chosen
        }
        judged = _judge(
            {name: models[name] for name in chosen}, gates, masks, classes, data, places, config
        )
        for name in chosen:
            for found in _rows(judged[name], masks[name], fits[name], config):
                row = {**dict.fromkeys(COLUMNS, math.nan), "model": name, **unit, **found}
                known = [
                    tuple(other[key] for key in _KEYS) for other in rows
                ]  # a killed run may have written some
                if tuple(row[key] for key in _KEYS) not in known:
                    rows.append(row) if table is None else table.append(row)
    return pd.DataFrame(rows)[list(COLUMNS)]


def _fit_places(data: Samples, config: Config) -> list[int]:
    """Places of the fit images, at random: of those that `limit` leaves out, and of the others once
    these are used."""
    if len(data) < 2:
        raise UserError(
            f"gates are chosen on some images and judged on others: at least 2 are needed, got {len(data)}"
        )
    scored = set(spread(len(data), config.limit))
    drawn = np.random.default_rng(config.seed).permutation(len(data)).tolist()
    return sorted(drawn, key=scored.__contains__)[: min(config.fit_images, len(data) // 2)]


def _fits(
    models: Mapping[str, VisionTransformer],
    gates: Mapping[str, Gates],
    data: Samples,
    places: Sequence[int],
    config: Config,
) -> dict[str, Fit]:
    """What each model does on the fit images, on every process."""
    geometries = {name: Geometry.of(model, data, config.resize) for name, model in models.items()}
    batches = _batches(data, places, set(geometries.values()), config)
    return {
        name: Fit(gates[name], batches, geometries[name], config.ablation == "mean")
        for name in models
    }


def _batches(
    data: Samples, places: Iterable[int], geometries: Iterable[Geometry], config: Config
) -> list[Batch]:
    """The fit images in batches that depend on no option; their index counts the images that can be
    read."""
    views, names, labels = {geometry: list[Any]() for geometry in geometries}, [], []
    for place in places:
        try:
            image, label, _ = data.read(place)
        except DataError:
            if not config.skip_corrupt:
                raise
            continue
        names.append(data.name(place))
        labels.append(label)
        for geometry, images in views.items():
            images.append(geometry(image, None)[0])
    if not names:
        raise DataError("none of the images that gates are chosen on can be read")
    whole = {geometry: torch.stack(images) for geometry, images in views.items()}
    return [
        Batch(
            index,
            torch.tensor(labels)[index],
            {geometry: (images[index], None) for geometry, images in whole.items()},
            [names[i] for i in index],
        )
        for index in torch.arange(len(names)).split(_FIT_BATCH)
    ]


def _judge(
    models: Mapping[str, VisionTransformer],
    gates: Mapping[str, Gates],
    masks: Mapping[str, Mapping[str, Tensor]],
    classes: Mapping[str, Tensor],
    data: Samples,
    fit: Sequence[int],
    config: Config,
) -> dict[str, dict[str, Any]]:
    """How each model answers under its gates, in one pass over the images that are not among the
    places `fit`."""
    judged = {
        name: Judged(
            model.num_classes, [len(of) for of in masks[name].values()], gates[name].device
        )
        for name, model in models.items()
    }
    loader, geometries = config.loader(data, models, "circuits")
    for batch in loader:
        for name, of_model in judged.items():

            def run(
                part: Batch, of: Gates = gates[name], name: str = name
            ) -> tuple[Tensor, Tensor, Tensor] | None:
                other = ~torch.isin(part.index, torch.tensor(fit))
                images = part.views[geometries[name]][0][other].to(of.device)
                if not len(images):
                    return None
                keep = torch.cat([*masks[name].values()]).to(images)
                with torch.inference_mode():
                    gated = [
                        of.logits(images, some)
                        for some in keep.split(max(1, _IMAGES_AT_ONCE // len(images)))
                    ]
                    return (
                        of.probe(images),
                        torch.cat(gated),
                        classes[name][part.labels[other]].to(images.device),
                    )

            for answers in filter(None, run_in_halves(run, batch)):
                of_model.update(*answers)
    return {name: of_model.compute() for name, of_model in judged.items()}


def _rows(
    found: Mapping[str, Any], masks: Mapping[str, Tensor], fit: Fit, config: Config
) -> Iterator[dict[str, Any]]:
    """The rows of one model at one method and fraction: the whole model, the conditions, the
    steps."""
    whole = found["whole"]
    of_all = {"kind": "all", "step": "all", "n": whole["n"], "chance": whole["chance"]}
    low, high = wilson_interval(whole["accuracy"] * whole["n"], whole["n"])
    yield {
        **of_all,
        "method": "none",
        "fraction": 1.0,
        "condition": "full",
        "kl": 0.0,
        "accuracy": whole["accuracy"],
        "low": low,
        "high": high,
        "agreement": 1.0,
    }
    for i, condition in enumerate(masks):
        kl, excess, accuracy = (
            {key: float(values[i]) for key, values in found[what].items()}
            for what in ("kl", "excess", "accuracy")
        )
        row = {
            **of_all,
            "condition": condition,
            "kl": kl["value"],
            "kl_low": kl["low"],
            "kl_high": kl["high"],
            "kl_least": float(found["kl_least"][i]),
            "kl_most": float(found["kl_most"][i]),
            "accuracy": accuracy["value"],
            "low": accuracy["low"],
            "high": accuracy["high"],
            "agreement": float(found["agreement"]["value"][i]),
        }
        of_others = {
            "excess": excess["value"],
            "excess_low": excess["low"],
            "excess_high": excess["high"],
        }
        yield row | (of_others if i else {})
    for kind, units in fit.gates.kinds.items():
        own = masks["per-step"][0][:, units]
        columns = {
            key: values.tolist() for key, values in structure(own, _NULL_DRAWS, config.seed).items()
        }
        for t, gates in enumerate(own.tolist()):
            yield {
                "condition": "per-step",
                "kind": kind,
                "step": str(t + 1),
                "n": fit.count,
                **{key: values[t] for key, values in columns.items()},
                "gates": "".join(".#"[each] for each in gates),
            }


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """KL by condition, and what shuffling adds to it."""
    of_models = frame[(frame["step"] == "all") & (frame["condition"] != "full")]
    keys = ["model", "method", "fraction"]
    kl = of_models.pivot(index=keys, columns="condition", values="kl")[list(LABELS)]
    shuffled = of_models[of_models["condition"] == "shuffled"].set_index(keys)
    added = shuffled[["excess", "excess_low", "excess_high"]].rename(
        columns=lambda key: f"shuffled_{key}"
    )
    return kl.join(added).reindex(shuffled.index).reset_index()
