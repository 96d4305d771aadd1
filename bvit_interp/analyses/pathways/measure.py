"""Do the steps of a pruned bViT use weights of their own?

Figs. 5 and 14, Table 7, section 4.2.3 and Appendix G of bViT (arXiv 2605.10661), for models with
one mask M_t a step (`FOLDER@masked` of a run of `bvit-interp prune`). How many steps use a weight;
the share of a step's weights that no other step uses, ``S_t = 1 - |M_t and U| / |M_t|`` with U the
union of the others (eq. 12, its exclusive reading); the overlap of two steps (Jaccard, eq. 11),
averaged by size; the sparsity of masks and of weights, ``1 - |union| / |W|``.

The nulls are ours (`probes/sharing.py`): independent masks as dense in every step and matrix. They
grow exclusive too when thinned out, ``S_t = prod_{s not t} (1 - q_s)``, 0.54 at the paper's 13th
round: S_t alone tells nothing. An empty mask has no S_t, two have no overlap (0 / 0, `--empty`);
the paper draws 1.0. Mean overlaps come without them and as 1.

Ours as well: with `--swaps` each step runs on the masks of each other step, the rest on their own
(does a pathway belong to its step?); `shuffled` runs all masks in another order. `collapse`, after
Routing the Lottery (arXiv 2601.22141, where a sharp rise of the overlap tells the drop in accuracy
without labels), compares a model's mean overlap with that of the next less sparse one of its run,
and is flagged where it rises, as random masks' never does.

Cost: 1 + `shuffles` forwards an image and model, with `--swaps` and 12 steps 71.5 more; ten models
of width 128 and 300 images of 32 px take 100 s on one core. Expected: in the paper attention's
projection is the most exclusive, the FFN shared but for step 1, and accuracy holds to 98 % mask
sparsity (above 0.85 at 94.5 %). The last row of its Table 7 (99.9 % of the masks, 98.2 % of the
weights) is arithmetically impossible: twelve masks of 0.124 % cover at most 1.49 % of the weights,
not 1.8 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.pathways import ALL, COLLAPSE, COLUMNS, PRUNED, Config, run_of
from bvit_interp.analyses.pathways.exchanges import Exchanges
from bvit_interp.analyses.pathways.sharing import Sharing
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.masks import PLACES, Masks, masks_of


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Sharing, sparsity and accuracy of every masked model.

    Parameters
    ----------
    models : name -> model made by `models.masks.masked`, others are refused; all see each image in
        one pass. Names that differ after their last "/" alone are of one pruning run.
    data : labelled images, of the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    sharing = {name: Sharing(_masks(name, model)) for name, model in models.items()}
    sparsity = {name: float(shared.sparsity(ALL).mean()) for name, shared in sharing.items()}
    collapse = _collapse(sharing, sparsity)
    rows = []
    for name, of_data in _accuracies(models, data, config).items():
        found = [*of_data, *_of_masks(sharing[name], config), *collapse.get(name, [])]
        rows += [{"model": name, "sparsity": sparsity[name], **row} for row in found]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _masks(name: str, model: VisionTransformer) -> Masks:
    masks = masks_of(model)
    if masks is None:
        raise UserError(
            f"{name} has no masks; give a folder of a pruning run with them: FOLDER@masked"
        )
    if set(masks) != set(PLACES) or masks.count != len(model.blocks):
        raise UserError(f"the masks of {name} are not of its {len(model.blocks)} steps")
    return masks


def _of_masks(sharing: Sharing, config: Config) -> Iterator[dict[str, Any]]:
    """The rows that the masks alone tell."""
    empty, by = float(config.empty), f"empty={config.empty}"
    yield from _rows("weight_sparsity_layer_mean", ALL, sharing.unused_by_layer().rows())
    for of in (ALL, *sharing.components):
        pruned = [PRUNED if left == 0 else None for left in sharing.sizes[of].tolist()]
        steps = [{"step": t, "flag": flag} for t, flag in enumerate(pruned, start=1)]
        pairs = [
            {"step": i + 1, "other_step": j + 1, "flag": pruned[i] and pruned[j]}
            for i, j in sharing.pairs
        ]
        uses = [{"uses": u} for u in range(1, len(steps) + 1)]
        sparsity, n = sharing.sparsity(of), sharing.width[of]
        yield from _rows("mask_sparsity", of, [{"value": float(sparsity.mean()), "n": n}])
        yield from _rows(
            "mask_sparsity", of, [{"value": value, "n": n} for value in sparsity.tolist()], steps
        )
        yield from _rows("weight_sparsity", of, sharing.unused(of).rows())
        yield from _rows(
            "least_weight_sparsity",
            of,
            [{"value": sharing.least_unused(of), "n": sharing.weights[of]}],
        )
        yield from _rows("mean_uses", of, sharing.mean_uses(of).rows(1, math.inf))
        yield from _rows("utilisation", of, sharing.utilisation(of).rows(), uses)
        yield from _rows(
            "specialization",
            of,
            sharing.specialization(of).or_else(empty).rows(),
            steps,
            convention=by,
        )
        yield from _rows("jaccard", of, sharing.jaccard(of, empty).rows(), pairs, convention=by)
        for each in dict.fromkeys((config.empty, "nan", "1")):
            mean = sharing.mean_jaccard(of, float(each)).rows()
            yield from _rows("jaccard_mean", of, mean, convention=f"empty={each}")


def _rows(
    statistic: str,
    component: str,
    numbers: Sequence[Mapping[str, Any]],
    places: Sequence[Mapping[str, Any]] = ({},),
    **same: Any,
) -> Iterator[dict[str, Any]]:
    """A row for each of the numbers, at its place."""
    for row, place in zip(numbers, places, strict=True):
        yield {"statistic": statistic, "component": component, **row, **place, **same}


def _collapse(
    sharing: Mapping[str, Sharing], sparsity: Mapping[str, float]
) -> dict[str, list[dict[str, Any]]]:
    """How much the mean overlap rises from a model to the next sparser one of its run; empty layers
    are left out."""
    rows = {}
    for run in dict.fromkeys(map(run_of, sharing)):
        names = sorted((name for name in sharing if run_of(name) == run), key=sparsity.__getitem__)
        means = [sharing[name].mean_jaccard(ALL) for name in names]
        for name, before, now in zip(names[1:], means, means[1:], strict=False):
            (row,) = now.minus(before).rows(-1)
            flag = COLLAPSE if row["value"] > row["high"] - row["null"] else None
            rows[name] = [*_rows("collapse", ALL, [row], convention="empty=nan", flag=flag)]
    return rows


def _accuracies(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config
) -> dict[str, list[dict[str, Any]]]:
    """Rows of each model's accuracies, in one pass over the images."""
    classes = {name: label_map(data, model) for name, model in models.items()}
    variants = {
        name: Exchanges(model, _masks(name, model), config.swaps, config.shuffles, config.seed)
        for name, model in models.items()
    }
    scores = {name: PerImage() for name in models}
    loader, geometries = config.loader(data, models, "pathways")
    for batch in loader:
        for name, variant in variants.items():

            def run(
                part: Any, name: str = name, variant: Exchanges = variant
            ) -> tuple[Tensor, Tensor]:
                wanted = classes[name][part.labels]
                with torch.inference_mode():
                    images = part.views[geometries[name]][0]
                    hits = [logits.argmax(-1).cpu() == wanted for logits in variant.logits(images)]
                return part.index, torch.stack([*hits, wanted], dim=1)

            for index, row in run_in_halves(run, batch):
                scores[name].update(index, row)
    return {name: _accuracy_rows(variants[name], scores[name].compute()[1]) for name in models}


def _accuracy_rows(variants: Exchanges, found: Tensor) -> list[dict[str, Any]]:
    """From hits of every variant and the class ``(n, variants + 1)``."""
    (*hits, labels), n = found.unbind(1), len(found)
    common = {"component": ALL, "null": int(labels.long().bincount().max()) / n, "n": n}

    def scored(statistic: str, of: Tensor) -> dict[str, Any]:
        low, high = wilson_interval(int(of.sum()), n)
        return {
            "statistic": statistic,
            **common,
            "value": float(of.mean()),
            "low": low,
            "high": high,
        }

    swaps = {(t, t): hits[0] for t, _ in variants.swaps} | dict(
        zip(variants.swaps, hits[1:], strict=False)
    )
    shuffled = [float(of.mean()) for of in hits[1 + len(variants.swaps) :]]
    rows = [scored("accuracy", hits[0])]
    if shuffled:
        mean = sum(shuffled) / len(shuffled)
        rows.append(
            {
                "statistic": "shuffled",
                **common,
                "value": mean,
                "low": min(shuffled),
                "high": max(shuffled),
            }
        )
    return rows + [
        scored("swapped", of) | {"step": t + 1, "other_step": s + 1}
        for (t, s), of in sorted(swaps.items())
    ]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All components and steps together."""
    return frame[(frame["component"] == ALL) & frame["step"].isna()]
