"""Which step is a shared weight's gradient for, do the steps agree, and does that tell which
weights to prune?

A weight applied T times has the gradient dL/dW = sum_t g_t, one term a step: exact, and read off a
copy of the model whose steps share nothing. Ours; not in bViT (arXiv 2605.10661), which asks the
same of masks. L is the mean cross-entropy. A row is one value of one `statistic`, of one `part` of
the block:

- `norm` ||g_t||, `share` of the squared norms of all steps, `taylor` share of the first-order
  importance, the sum of |w g_t| of the full gradient (Molchanov et al., 2017, arXiv 1611.06440;
  2019, arXiv 1906.10771); of heads too;
- `owner`, the share of weights (heads, neurons) whose g_t^2 is largest at step t;
  `owner_agreement`, how many weights have the same owner in two halves of the images; `entropy` of
  a weight's g_t^2 over its steps, over log T;
- `cosine` of two steps' terms, conflict where negative (Yu et al., 2020, arXiv 2001.06782);
  `cosine_apart`, the same from different images, where a step with itself is the ceiling;
  `sum_ratio` ||sum_t g_t||^2 / sum_t ||g_t||^2, 1 for terms at right angles, T for equal ones;
- `accuracy` when the least important weights of all four matrices are set to zero, nothing
  retrained, and `gain` over another method. Masks are made of one half of the images and scored on
  the other, and the other way round.

In a stacked ViT nothing is shared: norms by depth and pruning remain, taylor alone of the
importances. A time embedding's row is one step's own and left out; a memory's inner updates belong
to their step. Intervals: a jackknife over folds of images. `null`: terms with their weights in
random order, or see `COLUMNS`. Several --ckpt: a training.

Cost: a forward and a backward in float64 an image, and a forward an image, method and sparsity: 640
images of 32 px, a bViT and a ViT of width 128 and five sparsities took 4.5 min of one core.
Computed, not measured: 1000 ImageNet images, bViT-B: 1e14 FLOPs in float64, by default 8e14 in
float32; minutes on a GPU, beside 5.4 GB of sums of folds. Expected: nothing is known; independent
random terms would have cosine 0 and sum ratio 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.step_attribution import COLUMNS, Config
from bvit_interp.analyses.step_attribution import gradients as probe
from bvit_interp.analyses.step_attribution.gradients import StepGradients, Untied, kept
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.samples import Samples, spread
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.statistics import PerImage


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """What the terms of every model's gradient say, and its accuracy when pruned by them.

    Parameters
    ----------
    models : name -> model; all see each image in one pass, and pruned in a second. Their weights
        are not written.
    data : labelled images, of the models' classes; at least as many as folds.
    """
    classes = {name: label_map(data, model) for name, model in models.items()}
    folds = _folds(data, config)
    copies = {name: Untied(model, torch.float64) for name, model in models.items()}
    sums = {
        name: StepGradients(config.folds, len(of.layout.blocks), of.weights.shape[1]).to(
            of.weights.device
        )
        for name, of in copies.items()
    }
    loader, geometries = config.loader(data, models, "step-attribution gradients")
    for batch in loader:
        for (fold, of_fold), (name, of) in itertools.product(_split(batch, folds), copies.items()):

            def run(part: Batch, name: str = name, of: Untied = of) -> tuple[Tensor, int]:
                return of.gradients(
                    part.views[geometries[name]][0], classes[name][part.labels]
                ), len(part)

            for terms, images in run_in_halves(run, of_fold):
                sums[name].update(fold, terms, images)
    rows: list[dict[str, Any]] = []
    for name, of in copies.items():
        rows += _gradient_rows(name, of, sums[name], config)
    ranks = {name: _ranks(of, sums[name], config) for name, of in copies.items()}
    for name, found in _hits(models, data, config, folds, classes, ranks).items():
        rows += _pruning_rows(name, _units(ranks[name], config), found)
    for row in rows:
        row["trained_steps"] = len(models[row["model"]].blocks)
    whole = dict.fromkeys(("unit", "block", "step", "other_step"), "Int64")
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS)).astype(whole)


def _folds(data: Samples, config: Config) -> dict[int, int]:
    """The fold of every image by its place in the data set, in a random order: data sets are sorted
    by class."""
    places = spread(len(data), config.limit)
    if len(places) < config.folds:
        raise UserError(
            f"{config.folds} folds of images need at least as many images, got {len(places)}"
        )
    order = np.random.default_rng(config.seed).permutation(len(places))
    return {place: int(i) % config.folds for place, i in zip(places, order, strict=True)}


def _split(batch: Batch, folds: Mapping[int, int]) -> Iterator[tuple[int, Batch]]:
    """The images of each fold (or half) in the batch."""
    of_image = [folds[int(place)] for place in batch.index]
    for fold in sorted(set(of_image)):
        rows = [i for i, own in enumerate(of_image) if own == fold]
        views = {geometry: (images[rows], None) for geometry, (images, _) in batch.views.items()}
        yield (
            fold,
            Batch(batch.index[rows], batch.labels[rows], views, [batch.names[i] for i in rows]),
        )


_AXES = {  # of the measures of probes.gradients.describe
    "norm": "step part",
    "share": "step part",
    "taylor": "step part",
    "head_share": "step head",
    "head_taylor": "step head",
    "owner": "step part",
    "cosine": "step other_step part",
    "cosine_apart": "step other_step part",
    "entropy": "block part",
    "head_entropy": "block head",
    "neuron_entropy": "block neuron",
    "owner_agreement": "block part",
    "sum_ratio": "block part",
}


def _gradient_rows(
    name: str, of: Untied, sums: StepGradients, config: Config
) -> list[dict[str, Any]]:
    """All that is said of the terms, with intervals and nulls."""
    layout, (total, count) = of.layout, sums.compute()

    def described(halves: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {
            key: value.cpu()
            for key, value in probe.describe(halves, images, of.weights, layout).items()
        }

    halves, images = probe.halves_of(total, count)
    found, null = (
        described(halves, images),
        described(probe.shuffled(halves, layout, config.seed), images),
    )
    without = [described(*probe.halves_of(total, count, fold)) for fold in range(config.folds)]
    half = {key: probe.jackknife(torch.stack([each[key] for each in without])) for key in found}
    chance, spread = (each.cpu() for each in probe.shuffled_cosine(total.sum(0), layout))
    equal = torch.full_like(found["share"], 1 / len(layout.blocks))
    null |= {
        "norm": probe.noise_norm(total, count, layout).cpu(),
        "share": equal,
        "taylor": equal,
        "cosine": chance,
        "cosine_apart": chance,
        "owner_agreement": found.get("agreement_null", equal),
    }

    def row(key: str, place: tuple[int, ...], **keys: Any) -> dict[str, Any]:
        value, error = float(found[key][place]), float(half[key][place])
        band = (
            {"null_high": float((chance + 1.96 * spread)[place])}
            if key.startswith("cosine")
            else {}
        )
        return {
            "model": name,
            **keys,
            "value": value,
            "low": value - error,
            "high": value + error,
            "null": float(null[key][place]),
            **band,
            "n": int(count.sum()),
        }

    parts = [*probe.PARTS, *probe.UNITS]
    rows = []
    for key, axes in _AXES.items():
        for place in (
            (~found[key].isnan()).nonzero().tolist() if key in found else ()
        ):  # nan: a block of one step
            at = dict(zip(axes.split(), place, strict=True))
            if at.get("other_step", math.inf) < at.get("step", 0) + (key == "cosine"):
                continue  # symmetric, and a term with itself
            keys: dict[str, Any] = {"statistic": key.removeprefix("head_").removeprefix("neuron_")}
            keys["block"] = layout.blocks[at["step"]] if "step" in at else at["block"]
            keys |= {axis: at[axis] + 1 for axis in ("step", "other_step") if axis in at}
            unit = axes.split()[-1]
            keys |= (
                {"part": parts[at[unit]]} if unit == "part" else {"part": unit, "unit": at[unit]}
            )
            if unit == "neuron":
                own = layout.groups[at["block"]]
                keys["step"] = own[int(found["neuron_share"][own, at[unit]].argmax())] + 1
            rows.append(row(key, tuple(place), **keys))
    return rows


def _ranks(of: Untied, sums: StepGradients, config: Config) -> dict[str, list[Tensor]]:
    """The order of the weights that each half of the images makes, by method."""
    (halves, _), tied = probe.halves_of(*sums.compute()), max(map(len, of.layout.groups)) > 1
    methods = [method for method in config.methods if tied or method not in probe.OF_SHARED]
    order = (of.weights, of.layout, config.seed)
    return {
        method: [probe.ranking(method, terms, *order) for terms in halves] for method in methods
    }


def _units(ranks: Mapping[str, Any], config: Config) -> list[tuple[str, float]]:
    """Methods and sparsities to score; the first is the model itself."""
    return [("none", 0.0), *itertools.product(ranks, sorted(config.sparsities))]


def _hits(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    folds: Mapping[int, int],
    classes: Mapping[str, Tensor],
    ranks: Mapping[str, Mapping[str, list[Tensor]]],
) -> dict[str, np.ndarray]:
    """Which images each pruned model gets right ``(n, units)``, and their classes in a last column;
    an image is scored under the masks that the half it is not in made."""
    copies, rows = (
        {name: Untied(model) for name, model in models.items()},
        {name: PerImage() for name in models},
    )
    halves = {place: fold % 2 for place, fold in folds.items()}
    loader, geometries = config.loader(data, models, "step-attribution pruning")
    for batch in loader:
        for (half, of_half), (name, of) in itertools.product(_split(batch, halves), copies.items()):

            def run(
                part: Batch, name: str = name, of: Untied = of, half: int = half
            ) -> tuple[Tensor, Tensor]:
                images, wanted = (
                    part.views[geometries[name]][0].to(of.weights),
                    classes[name][part.labels],
                )
                found = []
                for method, sparsity in _units(ranks[name], config):
                    of.keep(
                        kept(ranks[name][method][1 - half], method, sparsity) if sparsity else None
                    )
                    found.append(of.view(images).argmax(-1).cpu() == wanted)
                return part.index, torch.stack([*found, wanted], dim=1)

            with torch.inference_mode():
                for index, row in run_in_halves(run, of_half):
                    rows[name].update(index, row)
    return {name: each.compute()[1].numpy() for name, each in rows.items()}


def _pruning_rows(
    name: str, units: list[tuple[str, float]], found: np.ndarray
) -> list[dict[str, Any]]:
    """Accuracy of each unit, and what each method gains over magnitude and over the summed
    gradient."""
    hits, n = dict(zip(units, found[:, :-1].T, strict=True)), len(found)
    chance = np.bincount(found[:, -1].astype(int)).max() / n
    accuracy = {unit: float(of.mean()) for unit, of in hits.items()}
    rows: list[dict[str, Any]] = []
    for (method, sparsity), right in hits.items():
        base = {"model": name, "part": "all", "method": method, "sparsity": sparsity, "n": n}
        low, high = wilson_interval(float(right.sum()), n)
        control = accuracy.get(
            ("shifted_masks" if method == "own_masks" else "random", sparsity), math.nan
        )
        null = chance if method in ("none", "random") else control
        scored = {
            "statistic": "accuracy",
            "value": accuracy[method, sparsity],
            "low": low,
            "high": high,
            "null": null,
        }
        rows.append(base | scored)
        for against in ("magnitude", "taylor"):
            if against == method or (against, sparsity) not in hits:
                continue
            over = right - hits[against, sparsity]
            gain, error = float(over.mean()), 1.96 * float(over.std(ddof=1)) / math.sqrt(n)
            rows.append(
                {
                    **base,
                    "statistic": "gain",
                    "against": against,
                    "value": gain,
                    "low": gain - error,
                    "high": gain + error,
                    "null": control - accuracy[against, sparsity],
                }
            )
    return rows


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """What is said of all weights together, and accuracies at the middle sparsity."""
    whole = frame["statistic"].isin(["entropy", "owner_agreement", "sum_ratio"]) & (
        frame["part"] == "all"
    )
    sparsities = sorted({0.0, *frame["sparsity"].dropna()})
    middle = sparsities[len(sparsities) // 2]
    pruned = (frame["statistic"] == "accuracy") & frame["sparsity"].isin([0.0, middle])
    return frame[whole | pruned].dropna(axis=1, how="all")
