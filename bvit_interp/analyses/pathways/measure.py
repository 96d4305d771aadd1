"""Sharing of masks between steps, beside independent masks, and exchanged masks.

Figs. 5 and 14, Table 7, section 4.2.3 and Appendix G of bViT (arXiv 2605.10661), for models with
one mask M_t per step (`FOLDER@masked` of a run of `bvit-interp prune`). Measured are: the number of
steps that use a weight; the share of a step's weights that no other step uses, ``S_t = 1 - |M_t and
U| / |M_t|`` with U the union of the others (eq. 12, its exclusive reading); the overlap of two
steps (Jaccard, eq. 11), averaged by size; the sparsity of masks and of weights, ``1 - |union| /
|W|``.

The nulls are ours (`sharing.py`): independent masks as dense in every step and matrix. They, too,
grow exclusive when they become sparser, ``S_t = prod_{s not t} (1 - q_s)``, 0.54 at the paper's
13th round: S_t alone is no evidence. S_t of an empty mask and the overlap of two empty masks are
undefined (0 / 0, `--empty`); the paper draws 1.0. Mean overlaps are given both without them and
with 1.

Ours as well: with `--swaps` each step runs on the masks of each other step, while the rest keep
their own (does a pathway belong to its step?). `shuffled` runs all masks in another order.
`collapse` follows Routing the Lottery (arXiv 2601.22141), where a sharp rise of the overlap
predicts the drop in accuracy without labels. It compares a model's mean overlap with that of the
next less sparse model of its run, and is flagged where the overlap rises, which never happens to
random masks.

Cost: 1 + `shuffles` forwards per image and model, with `--swaps` and 12 steps 71.5 more. Ten models
of width 128 and 300 images of 32 px take 100 s on one core. Expected: in the paper attention's
projection is the most exclusive layer, the FFN is shared except in step 1, and accuracy holds to
98 % mask sparsity (above 0.85 at 94.5 %). The last row of its Table 7 (99.9 % of the masks, 98.2 %
of the weights) is arithmetically impossible: twelve masks of 0.124 % cover at most 1.49 % of the
weights, not 1.8 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.pathways import ALL_LAYERS, COLLAPSE, COLUMNS, PRUNED, Config, run_of
from bvit_interp.analyses.pathways.exchanges import Exchanges
from bvit_interp.analyses.pathways.sharing import Sharing
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.masks import PLACES, Masks, masks_of
from bvit_interp.models.unroll import for_any_model

Row = dict[str, Any]


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Sharing, sparsity and accuracy of every masked model.

    Parameters
    ----------
    models : name -> model made by `models.masks.masked`; others are refused. All see each image in
        one pass. Models whose names differ only after their last "/" are of one pruning run.
    data : labelled images of the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    masks = {name: _masks(name, model) for name, model in models.items()}
    sharing = {name: Sharing(of_model) for name, of_model in masks.items()}
    sparsity = {
        name: float(shared.mask_sparsity(ALL_LAYERS).mean()) for name, shared in sharing.items()
    }
    collapse = _collapse_rows(sharing, sparsity)
    accuracy = _accuracy_rows(models, masks, data, config)
    rows = []
    for name in models:
        of_model = [*accuracy[name], *_mask_rows(sharing[name], config), *collapse.get(name, [])]
        rows += [{"model": name, "sparsity": sparsity[name], **row} for row in of_model]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of all layers and steps together."""
    return frame[(frame["layer"] == ALL_LAYERS) & frame["step"].isna()]


def _masks(name: str, model: Model) -> Masks:
    if isinstance(model, CalledSteps):
        raise UserError(
            f"{name} is no BViT and no stacked timm VisionTransformer: masks are trained for those"
            " alone"
        )
    masks = masks_of(model)
    if masks is None:
        raise UserError(
            f"{name} has no masks; give a folder of a pruning run with them: FOLDER@masked"
        )
    if set(masks) != set(PLACES) or masks.count != len(model.blocks):
        raise UserError(f"the masks of {name} are not of its {len(model.blocks)} steps")
    return masks


def _accuracy_rows(
    models: Mapping[str, Model],
    masks: Mapping[str, Masks],
    data: Samples,
    config: Config,
) -> dict[str, list[Row]]:
    """Accuracies with the masks in place and exchanged, in one pass over the images."""
    exchanges = {
        name: Exchanges(model, masks[name], config.swaps, config.shuffles, config.seed)
        for name, model in models.items()
    }
    per_image = {name: PerImage() for name in models}

    def score(batch: ModelBatch) -> tuple[Tensor, Tensor]:
        runs = exchanges[batch.model].logits(batch.images)
        hits = [logits.argmax(-1) == batch.labels for logits in runs]
        return batch.index, torch.stack([*hits, batch.labels], dim=1).cpu()

    for name, (index, rows) in stream(
        models, data, config, score, progress="pathways", labels=True
    ):
        per_image[name].update(index, rows)
    return {name: _accuracies(exchanges[name], per_image[name].compute()[1]) for name in models}


def _accuracies(exchanges: Exchanges, scores: Tensor) -> list[Row]:
    """Rows of accuracies, from the hits of every run and the class ``(n, runs + 1)``."""
    *hits, labels = scores.unbind(1)
    n = len(scores)
    common = {"layer": ALL_LAYERS, "null": int(labels.long().bincount().max()) / n, "n": n}

    def row(metric: str, right: Tensor) -> Row:
        low, high = wilson_interval(int(right.sum()), n)
        return {"metric": metric, **common, "value": float(right.mean()), "low": low, "high": high}

    own, swaps = hits[0], exchanges.swaps
    rows = [row("accuracy", own)]
    shuffled = [float(right.mean()) for right in hits[1 + len(swaps) :]]
    if shuffled:
        mean, low, high = sum(shuffled) / len(shuffled), min(shuffled), max(shuffled)
        rows.append({"metric": "shuffled", **common, "value": mean, "low": low, "high": high})
    swapped = {(step, step): own for step, _ in swaps}
    swapped |= dict(zip(swaps, hits[1 : 1 + len(swaps)], strict=True))
    for (step, other), right in sorted(swapped.items()):
        rows.append(row("swapped", right) | {"step": step + 1, "other_step": other + 1})
    return rows


def _mask_rows(sharing: Sharing, config: Config) -> Iterator[Row]:
    """The rows that need the masks only."""
    empty, convention = float(config.empty), f"empty={config.empty}"
    mean_sparsity = sharing.mean_weight_sparsity().rows()
    yield from _rows("weight_sparsity_layer_mean", ALL_LAYERS, mean_sparsity)
    for layer in (ALL_LAYERS, *sharing.layers):
        pruned = [PRUNED if size == 0 else None for size in sharing.sizes[layer].tolist()]
        steps = [{"step": step, "flag": flag} for step, flag in enumerate(pruned, start=1)]
        pairs = [
            {"step": i + 1, "other_step": j + 1, "flag": pruned[i] and pruned[j]}
            for i, j in sharing.pairs
        ]
        uses = [{"uses": count} for count in range(1, len(steps) + 1)]
        sparsity, n = sharing.mask_sparsity(layer), sharing.width[layer]
        by_step = [{"value": value, "n": n} for value in sparsity.tolist()]
        least = {"value": sharing.least_weight_sparsity(layer), "n": sharing.weights[layer]}
        specialization = sharing.specialization(layer).fill_undefined(empty).rows()
        overlaps = sharing.jaccard(layer, empty).rows()
        yield from _rows("mask_sparsity", layer, [{"value": float(sparsity.mean()), "n": n}])
        yield from _rows("mask_sparsity", layer, by_step, steps)
        yield from _rows("weight_sparsity", layer, sharing.weight_sparsity(layer).rows())
        yield from _rows("least_weight_sparsity", layer, [least])
        yield from _rows("mean_uses", layer, sharing.mean_uses(layer).rows(1, math.inf))
        yield from _rows("utilisation", layer, sharing.utilisation(layer).rows(), uses)
        yield from _rows("specialization", layer, specialization, steps, convention=convention)
        yield from _rows("jaccard", layer, overlaps, pairs, convention=convention)
        for each in dict.fromkeys((config.empty, "nan", "1")):
            mean = sharing.mean_jaccard(layer, float(each)).rows()
            yield from _rows("jaccard_mean", layer, mean, convention=f"empty={each}")


def _rows(
    metric: str,
    layer: str,
    numbers: Sequence[Mapping[str, Any]],
    keys: Sequence[Mapping[str, Any]] = ({},),
    **shared: Any,
) -> Iterator[Row]:
    """A row for each of the numbers, with its keys."""
    for row, row_keys in zip(numbers, keys, strict=True):
        yield {"metric": metric, "layer": layer, **row, **row_keys, **shared}


def _collapse_rows(
    sharing: Mapping[str, Sharing], sparsity: Mapping[str, float]
) -> dict[str, list[Row]]:
    """Rise of the mean overlap from a model to the next sparser one of its run.

    Overlaps of two empty masks are left out.
    """
    rows = {}
    for run in dict.fromkeys(map(run_of, sharing)):
        names = sorted((name for name in sharing if run_of(name) == run), key=sparsity.__getitem__)
        means = [sharing[name].mean_jaccard(ALL_LAYERS) for name in names]
        for name, before, now in zip(names[1:], means, means[1:], strict=False):
            (row,) = now.minus(before).rows(-1)
            flag = COLLAPSE if row["value"] > row["null_high"] - row["null"] else None
            rows[name] = [*_rows("collapse", ALL_LAYERS, [row], convention="empty=nan", flag=flag)]
    return rows
