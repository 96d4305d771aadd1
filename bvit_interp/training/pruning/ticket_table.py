"""What subnetworks' masks and answers say: how alike the masks are, how large, and how right the
answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bvit_interp.metrics import jaccard, one_vs_rest
from bvit_interp.models.masks import Masks

ALL, MEAN = "all", "mean"
COLUMNS = {
    "method": "rtl (a mask a subset, one tensor), imp (one mask, one model), multi (a mask and a model a subset) or "
    "random (as rtl, with masks drawn at random: the null of learned ones)",
    "by": "what subsets are: class, class-step, cluster or column",
    "subset": "its name, or all: their mean; of accuracy the whole",
    "layer": "masked weight (name[t] of step t by class-step); all: as one; mean: over layers that no subset empties",
    "round": "prunings so far",
    "sparsity": "share of the layer's weights that the subset's mask prunes, 0..1",
    "parameters": "weights of the layer in the mask; of subset all, those the method stores: the union, or multi's sum",
    "ratio": "parameters over the layer's weights of one model: above 1 for several models",
    "similarity": "mean Jaccard overlap of the subset's mask with each other's, 0..1; nan beside an empty one",
    "null_similarity": "the same if the masks were independent: q / (2 - q) for equal densities q",
    "step_similarity": "by class-step: mean Jaccard overlap with the masks of the subset's other steps, 0..1",
    "empty": "subset all: subsets that the layer is empty for, or how many layers are emptied for any, by number",
    "rise": "layer mean of subset all: similarity above its least so far",
    "collapsed": "there: 1 from the first round whose rise exceeds the tolerance on",
    "recall": "TP / P one-vs-rest on the test images, 0..1; where subsets are no classes, mean over classes",
    "precision": "TP / (TP + FP), the same way; 0 for a class that is never said",
    "balanced_accuracy": "mean of recall and TN / N, 0..1; 0.5 for an answer that does not look",
    "swapped": "balanced accuracy with the mask of the next subset: the null of that a mask is its subset's own",
    "accuracy": "share of test images named right, 0..1: by class of the largest answer, which needs no routing",
    "chance": "the null of accuracy: share of the most frequent class",
    "n": "test images",
    "train_images": "images the method was trained on up to here, of all subsets, with extraction and rewinding",
    "seed": "of the recipe",
}
KEYS = ("method", "by", "subset", "layer", "round")
SCORES = ("recall", "precision", "balanced_accuracy")


def mask_rows(
    masks: Masks, rows: int, names: Sequence[str], *, separate: bool = False
) -> list[dict[str, Any]]:
    """The columns that masks decide: a row a subset and one of all, for each layer, `ALL` and the
    `MEAN` of them.

    Parameters
    ----------
    masks : those of subset k in rows k R to k R + R - 1.
    rows : R, of a subset: 1, or its steps.
    names : of the K subsets.
    separate : each subset's weights are in a model of its own.
    """
    count = len(names)
    weights = {
        name.removesuffix(".weight"): mask.view(count, rows, -1) for name, mask in masks.items()
    }
    layers = {
        f"{name}[{r + 1}]" if rows > 1 else name: (bits[:, r : r + 1], _beside(bits)[:, r])
        for name, bits in weights.items()
        for r in range(rows)
    }
    whole = torch.cat([*weights.values()], -1)
    found, full = [], []
    for label, (bits, beside) in [*layers.items(), (ALL, (whole, _beside(whole).nanmean(1)))]:
        kept = bits.any(1).sum(1)
        parts = [bits] if label != ALL else [own for own, _ in layers.values()]
        alike = {
            "similarity": _others(jaccard(bits.flatten(1))),
            "null_similarity": _others(expected(parts)),
            "step_similarity": beside,
        }
        holes = [int((~own.flatten(1).any(1)).sum()) for own in parts]
        if label != ALL and not holes[0]:
            full.append(alike)
        stored = int(kept.sum() if separate else bits.any(0).any(0).sum())
        pruned = 1 - bits.flatten(1).double().mean(1)
        for k, name in enumerate([*names, ALL]):
            of_all = k == count
            parameters = stored if of_all else int(kept[k])
            found.append(
                {
                    "subset": name,
                    "layer": label,
                    "sparsity": float(pruned.mean() if of_all else pruned[k]),
                    "parameters": parameters,
                    "ratio": parameters / bits.shape[-1],
                    **{
                        column: float(own.nanmean() if of_all else own[k])
                        for column, own in alike.items()
                    },
                    **(
                        {"empty": sum(hole > 0 for hole in holes) if label == ALL else holes[0]}
                        if of_all
                        else {}
                    ),
                }
            )
    for k, name in enumerate([*names, ALL]):
        row: dict[str, Any] = {"subset": name, "layer": MEAN}
        for column in full[0] if full else ():
            own = torch.stack([alike[column] for alike in full])
            row[column] = float(own.nanmean() if k == count else own[:, k].nanmean())
        found.append(row)
    return found


def expected(layers: Sequence[Tensor]) -> Tensor:
    """Jaccard overlap ``(K, K)`` of masks that are independent in each layer, where they have the
    layer's densities.

    Of one layer, ``q_i q_j / (q_i + q_j - q_i q_j)``; of several, expected intersection over
    expected union.
    """
    both, either = torch.zeros(()).double(), torch.zeros(()).double()
    for bits in layers:
        kept = bits.flatten(1).sum(1).double()
        shared = kept[:, None] * kept / bits[0].numel()
        both, either = both + shared, either + kept[:, None] + kept - shared
    return both / either


def empty_layers(masks: Masks, rows: int, names: Sequence[str]) -> list[str]:
    """Layers without a weight, as ``fc1[3] for cat``."""
    found = []
    for weight, mask in masks.items():
        for place in (~mask.flatten(1).any(1)).nonzero().flatten().tolist():
            k, r = divmod(place, rows)
            found.append(
                f"{weight.removesuffix('.weight')}{f'[{r + 1}]' if rows > 1 else ''} for {names[k]}"
            )
    return found


def score_rows(
    said: Tensor, truth: Tensor, of_image: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """`SCORES` for each subset and all, on the natural distribution of the test images.

    Parameters
    ----------
    said, truth : bool ``(n, C)``.
    of_image : the subset of each image, or -1 throughout where subset k is class k.
    names : of the subsets.
    """
    found = []
    by_class = bool((of_image < 0).all())
    scores = torch.stack(one_vs_rest(said, truth))
    for k, name in enumerate(names):
        own = torch.from_numpy(of_image == k)
        mine = (
            scores[:, k] if by_class else torch.stack(one_vs_rest(said[own], truth[own])).nanmean(1)
        )
        found.append(
            {"subset": name, "layer": ALL, "n": len(said) if by_class else int(own.sum())}
            | _named(mine)
        )
    return [*found, {"subset": ALL, "layer": ALL, "n": len(said)} | _named(scores.nanmean(1))]


def with_collapse(frame: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The table with `rise` and `collapsed`: does the layers' mean overlap go up along the rounds,
    without labels?

    The paper sees overlap rise sharply with or just before the loss of accuracy (at 70-80 %
    sparsity); independent masks overlap ever less. Ours: collapse begins at the first round whose
    overlap is more than `tolerance` above its least so far. Layers that are empty for a subset are
    not in the mean.
    """
    frame = frame.assign(rise=np.nan, collapsed=np.nan)
    chosen = frame[
        (frame["layer"] == MEAN) & (frame["subset"] == ALL) & frame["similarity"].notna()
    ]
    for _, own in chosen.sort_values("round").groupby("method"):
        rise = own["similarity"] - own["similarity"].cummin()
        frame.loc[own.index, "rise"] = rise
        frame.loc[own.index, "collapsed"] = (rise > tolerance).cummax().astype(float)
    return frame


def _named(scores: Tensor) -> dict[str, float]:
    return dict(zip(SCORES, scores.tolist(), strict=True))


def _others(matrix: Tensor) -> Tensor:
    """Mean of each row ``(K, K)`` without the diagonal and nan."""
    return matrix.clone().fill_diagonal_(torch.nan).nanmean(1)


def _beside(bits: Tensor) -> Tensor:
    """Mean overlap of each step's mask with the subset's other steps: bool ``(K, R, W)`` -> ``(K,
    R)``."""
    return torch.stack([_others(jaccard(own)) for own in bits])
