"""Overlap, size and scores of the subnetworks, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bvit_interp.metrics import jaccard, one_vs_rest
from bvit_interp.models.masks import Masks

ALL = "all"
MEAN = "mean"
KEYS = ("method", "by", "subset", "layer", "round")
SCORES = ("recall", "precision", "balanced_accuracy")
COLUMNS = {
    "method": "rtl (a mask per subset, one tensor of weights), imp (one mask, one model), multi (a"
    " mask and a model per subset) or random (like rtl, but with random masks: the null of learned"
    " masks)",
    "by": "kind of the subsets: class, class-step, cluster or column",
    "subset": "name of the subset, or all: the mean over subsets; for accuracy, all images",
    "layer": "masked weight, name[t] for step t with class-step; all: all layers together; mean:"
    " mean over the layers that are empty for no subset",
    "round": "number of prunings so far",
    "sparsity": "share of the layer's weights that the subset's mask prunes, 0..1",
    "parameters": "number of the layer's weights in the mask; for subset all, the number that the"
    " method stores (the union of the masks, or the sum for multi)",
    "ratio": "parameters divided by the layer's weights in one model; above 1 for several models",
    "similarity": "mean Jaccard overlap of the subset's mask with those of the others, 0..1; nan"
    " if both masks of a pair are empty",
    "null_similarity": "null of the similarity: expected overlap of independent masks of the same"
    " densities; q / (2 - q) for equal densities q",
    "step_similarity": "with class-step: mean Jaccard overlap with the masks of the subset's other"
    " steps, 0..1",
    "empty": "for subset all: number of subsets that the layer is empty for; for layer all: number"
    " of layers that are empty for any subset",
    "rise": "for the layer mean of subset all: similarity minus its minimum so far",
    "collapsed": "in the same rows: 1 from the first round on whose rise exceeds the tolerance,"
    " else 0",
    "recall": "TP / P, one-vs-rest, on the test images, 0..1; mean over classes if subsets are not"
    " classes",
    "precision": "TP / (TP + FP), in the same way, 0..1; 0 for a class that is never predicted",
    "balanced_accuracy": "mean of recall and TN / N, 0..1; 0.5 for a prediction that does not"
    " depend on the image",
    "swapped": "null of the balanced accuracy: with the mask of the next subset, 0..1",
    "accuracy": "share of test images classified correctly, 0..1; with class subsets, by the"
    " largest logit, which needs no routing",
    "chance": "null of the accuracy: share of the most frequent class, 0..1",
    "n": "number of test images",
    "n_train": "number of images that the method was trained on so far, over all subsets, with"
    " extraction and rewinding",
    "seed": "random seed of the recipe",
}


def mask_rows(
    masks: Masks, rows: int, names: Sequence[str], *, separate: bool = False
) -> list[dict[str, Any]]:
    """The columns that follow from the masks.

    There is a row per subset and one for all of them, for each layer, for `ALL` layers together and
    for the `MEAN` of the layers.

    Parameters
    ----------
    masks : those of subset k are rows k R to k R + R - 1.
    rows : R, masks per subset: 1, or the number of steps.
    names : names of the K subsets.
    separate : each subset's weights are in a model of its own.
    """
    count = len(names)
    weights = {
        name.removesuffix(".weight"): mask.view(count, rows, -1) for name, mask in masks.items()
    }
    layers = {
        f"{name}[{r + 1}]" if rows > 1 else name: (bits[:, r : r + 1], _between_steps(bits)[:, r])
        for name, bits in weights.items()
        for r in range(rows)
    }
    whole = torch.cat([*weights.values()], -1)
    every = [*layers.items(), (ALL, (whole, _between_steps(whole).nanmean(1)))]
    table: list[dict[str, Any]] = []
    nowhere_empty = []
    for label, (bits, between_steps) in every:
        parts = [bits] if label != ALL else [own for own, _ in layers.values()]
        overlap = {
            "similarity": _mean_of_others(jaccard(bits.flatten(1))),
            "null_similarity": _mean_of_others(expected_jaccard(parts)),
            "step_similarity": between_steps,
        }
        empty = [int((~part.flatten(1).any(1)).sum()) for part in parts]
        if label != ALL and not empty[0]:
            nowhere_empty.append(overlap)
        kept = bits.any(1).sum(1)
        sparsity = 1 - bits.flatten(1).double().mean(1)
        for k, name in enumerate(names):
            row = {"subset": name, "layer": label, "sparsity": float(sparsity[k])}
            row |= _size(int(kept[k]), bits)
            table.append(row | {column: float(values[k]) for column, values in overlap.items()})
        row = {"subset": ALL, "layer": label, "sparsity": float(sparsity.mean())}
        row |= _size(int(kept.sum() if separate else bits.any(0).any(0).sum()), bits)
        row |= {column: float(values.nanmean()) for column, values in overlap.items()}
        row["empty"] = sum(number > 0 for number in empty) if label == ALL else empty[0]
        table.append(row)
    return table + _mean_rows(nowhere_empty, names)


def _size(parameters: int, bits: Tensor) -> dict[str, Any]:
    return {"parameters": parameters, "ratio": parameters / bits.shape[-1]}


def _mean_rows(layers: Sequence[dict[str, Tensor]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the layer `MEAN`."""
    table = []
    for k, name in enumerate([*names, ALL]):
        row: dict[str, Any] = {"subset": name, "layer": MEAN}
        for column in layers[0] if layers else ():
            values = torch.stack([layer[column] for layer in layers])
            row[column] = float(values.nanmean() if k == len(names) else values[:, k].nanmean())
        table.append(row)
    return table


def expected_jaccard(
    layers: Sequence[Bool[Tensor, "subsets ..."]],
) -> Float[Tensor, "subsets subsets"]:
    """Expected Jaccard overlap of masks that are independent in each layer and have its densities.

    For one layer it is ``q_i q_j / (q_i + q_j - q_i q_j)``; for several, the expected intersection
    divided by the expected union.
    """
    intersection, union = torch.zeros(()).double(), torch.zeros(()).double()
    for bits in layers:
        kept = bits.flatten(1).sum(1).double()
        shared = kept[:, None] * kept / bits[0].numel()
        intersection = intersection + shared
        union = union + kept[:, None] + kept - shared
    return intersection / union


def empty_layers(masks: Masks, rows: int, names: Sequence[str]) -> list[str]:
    """Layers without a weight, as ``fc1[3] for cat``."""
    listed = []
    for weight, mask in masks.items():
        for row in (~mask.flatten(1).any(1)).nonzero().flatten().tolist():
            k, r = divmod(row, rows)
            step = f"[{r + 1}]" if rows > 1 else ""
            listed.append(f"{weight.removesuffix('.weight')}{step} for {names[k]}")
    return listed


def score_rows(
    predicted: Bool[Tensor, "images classes"],
    truth: Bool[Tensor, "images classes"],
    subset: np.ndarray,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """`SCORES` of each subset and of all, on the natural distribution of the test images.

    Parameters
    ----------
    predicted, truth : whether each image is predicted to be of each class, and whether it is.
    subset : the subset of each image; -1 for all images where subset k is class k.
    names : names of the subsets.
    """
    by_class = bool((subset < 0).all())
    scores = torch.stack(one_vs_rest(predicted, truth))
    table = []
    for k, name in enumerate(names):
        if by_class:
            n, values = len(predicted), scores[:, k]
        else:
            chosen = torch.from_numpy(subset == k)
            n = int(chosen.sum())
            values = torch.stack(one_vs_rest(predicted[chosen], truth[chosen])).nanmean(1)
        table.append({"subset": name, "layer": ALL, "n": n} | _named(values))
    whole = {"subset": ALL, "layer": ALL, "n": len(predicted)}
    return [*table, whole | _named(scores.nanmean(1))]


def with_collapse(frame: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The table with `rise` and `collapsed`: signs of too much pruning that need no labels.

    In the paper the overlap of the masks rises sharply with, or just before, the loss of accuracy
    (at 70-80 % sparsity); the overlap of independent masks only falls. Ours: the collapse begins at
    the first round whose overlap is more than `tolerance` above its minimum so far. Layers that are
    empty for a subset are left out of the mean.
    """
    frame = frame.assign(rise=np.nan, collapsed=np.nan)
    chosen = frame[
        (frame["layer"] == MEAN) & (frame["subset"] == ALL) & frame["similarity"].notna()
    ]
    for _, rounds in chosen.sort_values("round").groupby("method"):
        rise = rounds["similarity"] - rounds["similarity"].cummin()
        frame.loc[rounds.index, "rise"] = rise
        frame.loc[rounds.index, "collapsed"] = (rise > tolerance).cummax().astype(float)
    return frame


def _named(scores: Tensor) -> dict[str, float]:
    return dict(zip(SCORES, scores.tolist(), strict=True))


def _mean_of_others(matrix: Tensor) -> Tensor:
    """Mean of each row ``(K, K)`` without the diagonal and nan."""
    return matrix.clone().fill_diagonal_(torch.nan).nanmean(1)


def _between_steps(bits: Tensor) -> Tensor:
    """Mean overlap of each step's mask with those of the subset's other steps: bool ``(K, R, W)``
    -> ``(K, R)``."""
    return torch.stack([_mean_of_others(jaccard(steps)) for steps in bits])
