"""Gradients of shared weights, one term per step, and pruning.

A weight applied T times has the gradient ``dL/dW = sum_t g_t``, one term per step. The terms are
exact: they are the gradients of a copy of the model whose steps share nothing. This is ours and not
in bViT (arXiv 2605.10661), which asks the same question about masks. L is the mean cross-entropy.
A row is one value of one `metric` for one `layer` of the block:

- `norm` ||g_t||, `share` of the squared norms of all steps, `taylor` share of the first-order
  importance, the sum of |w g_t| of the full gradient (Molchanov et al., 2017, arXiv 1611.06440;
  2019, arXiv 1906.10771); for heads too;
- `owner`, the share of weights (heads, neurons) whose g_t^2 is largest at step t;
  `owner_agreement`, the share of weights with the same owner in two halves of the images; `entropy`
  of a weight's g_t^2 over its steps, divided by log T;
- `cosine` of two steps' terms, in conflict where negative (Yu et al., 2020, arXiv 2001.06782);
  `cosine_apart`, between terms from different images: the cosine of a step with itself is the
  largest that can be expected; `sum_ratio` ||sum_t g_t||^2 / sum_t ||g_t||^2, 1 for orthogonal
  terms, T for equal ones;
- `accuracy` when the least important weights of all four matrices are set to zero without
  retraining, and `gain` over another method. Masks are made from one half of the images and scored
  on the other half, and vice versa.

Blocks must have four matrices, qkv, proj, fc1 and fc2, as those of timm, torch's encoder and
torchvision have; any loop over them will do. A stacked ViT shares nothing: norms by depth and
pruning remain, and of the importances taylor alone. The row of a time embedding belongs to one step
and is left out. Inner updates of a memory belong to their step. Confidence intervals are a
jackknife over folds of images. `null` is the value for terms with their weights in random order, or
as `COLUMNS` says. Several --ckpt show a training.

Cost: a forward and a backward in float64 per image, and a forward per image, method and sparsity.
640 images of 32 px, a bViT and a ViT of width 128 and five sparsities took 4.5 min of one core.
Computed, not measured: 1000 ImageNet images and bViT-B take 1e14 FLOPs in float64 and by default
8e14 in float32, minutes on a GPU, with 5.4 GB for the sums of folds. Expected: nothing is known;
independent random terms would have cosine 0 and sum ratio 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.step_attribution import COLUMNS, Config
from bvit_interp.analyses.step_attribution.decomposition import (
    GROUPS,
    describe,
    shuffled,
    shuffled_cosine,
)
from bvit_interp.analyses.step_attribution.fold_gradients import (
    FoldGradients,
    mean_of_halves,
    sampling_norm,
)
from bvit_interp.analyses.step_attribution.importance import NEED_SHARING, importance, prune
from bvit_interp.analyses.step_attribution.untied import Layout, Untied
from bvit_interp.data.labels import label_map
from bvit_interp.data.samples import Samples, Subset, evenly_spaced
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.statistics import Z_95, jackknife_half_width
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.looped import Model
from bvit_interp.models.unroll import for_any_model

Row = dict[str, Any]


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Measures of the terms of every model's gradient, and its accuracy when pruned by them.

    Parameters
    ----------
    models : name -> model; all see each image in one pass, and pruned in a second. Their weights
        are not written.
    data : labelled images of the models' classes; at least as many as folds.

    Returns
    -------
    A table of `COLUMNS`.
    """
    for model in models.values():
        # classes that do not match are refused before anything is copied
        label_map(data, model, config.classes)
    folds = _folds(data, config)
    untied = {name: Untied(model, torch.float64) for name, model in models.items()}
    sums = _sum_gradients(models, untied, data, folds, config)
    rows: list[Row] = []
    masks: dict[str, _Masks] = {}
    for name, copy in untied.items():
        rows += [{"model": name, **row} for row in _gradient_rows(copy, sums[name], config)]
        masks[name] = _masks(copy, sums[name], config)
    hits = _score_pruned(models, masks, data, folds, config)
    for name, scores in hits.items():
        settings = [_WHOLE, *masks[name]]
        rows += [{"model": name, **row} for row in _pruning_rows(settings, scores)]
    steps = {name: len(model.blocks) for name, model in models.items()}
    frame = pd.DataFrame(rows)
    frame = frame.assign(trained_steps=frame["model"].map(steps))
    integers = dict.fromkeys(("unit", "block", "step", "other_step"), "Int64")
    return frame.reindex(columns=list(COLUMNS)).astype(integers)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Measures of all weights together, and accuracies at the middle sparsity."""
    metrics = ["entropy", "owner_agreement", "sum_ratio"]
    whole = frame["metric"].isin(metrics) & (frame["layer"] == "all")
    sparsities = sorted({0.0, *frame["sparsity"].dropna()})
    middle = sparsities[len(sparsities) // 2]
    pruned = (frame["metric"] == "accuracy") & frame["sparsity"].isin([0.0, middle])
    return frame[whole | pruned].dropna(axis=1, how="all")


def _folds(data: Samples, config: Config) -> list[list[int]]:
    """Positions of the images of each fold, at random: data sets are sorted by class."""
    positions = np.array(evenly_spaced(len(data), config.limit))
    if len(positions) < config.folds:
        raise UserError(
            f"{config.folds} folds of images need at least as many images, got {len(positions)}"
        )
    order = np.random.default_rng(config.seed).permutation(len(positions))
    return [positions[order % config.folds == fold].tolist() for fold in range(config.folds)]


def _sum_gradients(
    models: Mapping[str, Model],
    untied: Mapping[str, Untied],
    data: Samples,
    folds: list[list[int]],
    config: Config,
) -> dict[str, FoldGradients]:
    """Terms of every model's gradient, summed over each fold; every image is read once."""
    sums = {}
    for name, copy in untied.items():
        steps, weights = len(copy.layout.blocks), copy.weights.shape[1]
        sums[name] = FoldGradients(len(folds), steps, weights).to(copy.weights.device)

    def terms(batch: ModelBatch) -> tuple[Tensor, int]:
        return untied[batch.model].gradients(batch.images, batch.labels), len(batch)

    options = replace(config, limit=None)
    for fold, positions in enumerate(folds):
        progress = f"step-attribution gradients, fold {fold + 1} of {len(folds)}"
        for name, (total, images) in stream(
            models,
            Subset(data, positions),
            options,
            terms,
            progress=progress,
            labels=True,
            grad=True,
        ):
            sums[name].update(fold, total, images)
    return sums


# ---- rows of the gradient ----


_AXES = {  # of the measures of `describe`
    "norm": ("step", "layer"),
    "share": ("step", "layer"),
    "taylor": ("step", "layer"),
    "head_share": ("step", "head"),
    "head_taylor": ("step", "head"),
    "owner": ("step", "layer"),
    "cosine": ("step", "other_step", "layer"),
    "cosine_apart": ("step", "other_step", "layer"),
    "entropy": ("block", "layer"),
    "head_entropy": ("block", "head"),
    "neuron_entropy": ("block", "neuron"),
    "owner_agreement": ("block", "layer"),
    "sum_ratio": ("block", "layer"),
}


def _gradient_rows(copy: Untied, sums: FoldGradients, config: Config) -> list[Row]:
    """All measures of the terms, with confidence intervals and nulls."""
    layout, weights = copy.layout, copy.weights
    total, count = sums.compute()

    def measures(halves: Tensor, images: Tensor) -> dict[str, Tensor]:
        described = describe(halves, images, weights, layout)
        return {key: value.cpu() for key, value in described.items()}

    halves, images = mean_of_halves(total, count)
    values = measures(halves, images)
    without = [measures(*mean_of_halves(total, count, fold)) for fold in range(len(count))]
    half_widths = {
        key: jackknife_half_width(torch.stack([each[key] for each in without]).numpy())
        for key in values
    }
    null_cosine, null_std = (each.cpu() for each in shuffled_cosine(total.sum(0), layout))
    null_high = null_cosine + Z_95 * null_std
    equal_steps = torch.full_like(values["share"], 1 / len(layout.blocks))
    nulls = measures(shuffled(halves, layout, config.seed), images) | {
        "norm": sampling_norm(total, count, layout).cpu(),
        "share": equal_steps,
        "taylor": equal_steps,
        "cosine": null_cosine,
        "cosine_apart": null_cosine,
        "owner_agreement": values.get("agreement_null", equal_steps),
    }
    rows = []
    for key, axes in _AXES.items():
        if key not in values:
            continue  # no two steps share a block
        for index in map(tuple, (~values[key].isnan()).nonzero().tolist()):
            at = dict(zip(axes, index, strict=True))
            if _is_mirrored(key, at):
                continue
            value, half_width = float(values[key][index]), float(half_widths[key][index])
            row = {
                "metric": key.removeprefix("head_").removeprefix("neuron_"),
                **_keys(at, layout, values),
                "value": value,
                "low": value - half_width,
                "high": value + half_width,
                "null": float(nulls[key][index]),
                "n": int(count.sum()),
            }
            if key.startswith("cosine"):
                row["null_high"] = float(null_high[index])
            rows.append(row)
    return rows


def _is_mirrored(key: str, at: Mapping[str, int]) -> bool:
    """Whether a cosine has its row already, or is that of a term with itself."""
    if "other_step" not in at:
        return False
    return at["other_step"] < at["step"] + (1 if key == "cosine" else 0)


def _keys(at: Mapping[str, int], layout: Layout, values: Mapping[str, Tensor]) -> Row:
    """The key columns of a measure, from its index along each axis."""
    keys: Row = {"block": layout.blocks[at["step"]] if "step" in at else at["block"]}
    keys |= {axis: at[axis] + 1 for axis in ("step", "other_step") if axis in at}
    if "layer" in at:
        return keys | {"layer": GROUPS[at["layer"]]}
    unit = "head" if "head" in at else "neuron"
    keys |= {"layer": unit, "unit": at[unit]}
    if unit == "neuron":
        steps = layout.steps_of_blocks[at["block"]]
        owner = int(values["neuron_share"][steps, at["neuron"]].argmax())
        keys["step"] = steps[owner] + 1
    return keys


# ---- pruning ----


class _Setting(NamedTuple):
    """How a model is pruned."""

    method: str
    sparsity: float


_WHOLE = _Setting("none", 0.0)
_Masks = dict[_Setting, tuple[Tensor, Tensor]]
"""Per setting the masks made from the even and from the odd folds."""


def _masks(copy: Untied, sums: FoldGradients, config: Config) -> _Masks:
    halves, _ = mean_of_halves(*sums.compute())
    layout = copy.layout
    shares = max(map(len, layout.steps_of_blocks)) > 1
    masks: _Masks = {}
    for method in config.methods:
        if method in NEED_SHARING and not shares:
            continue
        scores = [importance(method, terms, copy.weights, layout, config.seed) for terms in halves]
        for sparsity in sorted(config.sparsities):
            first, second = (prune(each, method, sparsity) for each in scores)
            masks[_Setting(method, sparsity)] = first, second
    return masks


def _score_pruned(
    models: Mapping[str, Model],
    masks: Mapping[str, _Masks],
    data: Samples,
    folds: list[list[int]],
    config: Config,
) -> dict[str, np.ndarray]:
    """Which images each pruned model gets right, and their classes, ``(n, settings + 1)``.

    The first column is the whole model's. An image is scored under the masks made from the half of
    the images that it is not in.
    """
    untied = {name: Untied(model) for name, model in models.items()}
    per_image = {name: PerImage() for name in models}
    options = replace(config, limit=None)
    for half in (0, 1):
        positions = torch.tensor(sorted(itertools.chain(*folds[half::2])))
        made = {
            name: [of_halves[1 - half] for of_halves in of_model.values()]
            for name, of_model in masks.items()
        }
        for name, (index, rows) in stream(
            models,
            Subset(data, positions.tolist()),
            options,
            _Scorer(untied, made).score,
            progress=f"step-attribution pruning, half {half + 1} of 2",
            labels=True,
        ):
            per_image[name].update(positions[index], rows)
    return {name: each.compute()[1].numpy() for name, each in per_image.items()}


class _Scorer(NamedTuple):
    """Scores a batch whole and under each of a model's masks."""

    untied: Mapping[str, Untied]
    masks: Mapping[str, list[Tensor]]

    def score(self, batch: ModelBatch) -> tuple[Tensor, Tensor]:
        copy = self.untied[batch.model]
        images = batch.images.to(copy.weights)
        hits = [copy.model(images).argmax(-1) == batch.labels]
        for masks in self.masks[batch.model]:
            with copy.pruned(masks):
                hits.append(copy.model(images).argmax(-1) == batch.labels)
        return batch.index, torch.stack([*hits, batch.labels], dim=1).cpu()


def _pruning_rows(settings: list[_Setting], scores: np.ndarray) -> list[Row]:
    """Accuracy at each setting, and the gain of each method over magnitude and over taylor."""
    hits, n = dict(zip(settings, scores[:, :-1].T, strict=True)), len(scores)
    chance = np.bincount(scores[:, -1].astype(int)).max() / n
    accuracy = {setting: float(right.mean()) for setting, right in hits.items()}
    rows: list[Row] = []
    for (method, sparsity), right in hits.items():
        control = "shifted_masks" if method == "own_masks" else "random"
        control_accuracy = accuracy.get(_Setting(control, sparsity), math.nan)
        low, high = wilson_interval(float(right.sum()), n)
        keys = {"layer": "all", "method": method, "sparsity": sparsity, "n": n}
        rows.append(
            {
                "metric": "accuracy",
                **keys,
                "value": accuracy[_Setting(method, sparsity)],
                "low": low,
                "high": high,
                "null": chance if method in ("none", "random") else control_accuracy,
            }
        )
        for against in ("magnitude", "taylor"):
            other = _Setting(against, sparsity)
            if against == method or other not in hits:
                continue
            gains = right - hits[other]
            gain, half_width = float(gains.mean()), Z_95 * float(gains.std(ddof=1)) / math.sqrt(n)
            rows.append(
                {
                    "metric": "gain",
                    **keys,
                    "against": against,
                    "value": gain,
                    "low": gain - half_width,
                    "high": gain + half_width,
                    "null": control_accuracy - accuracy[other],
                }
            )
    return rows
