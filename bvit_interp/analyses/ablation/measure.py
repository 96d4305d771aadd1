"""Which heads and neurons does the answer need, and at which step does it need them?

Ours; not in bViT (arXiv 2605.10661), which ablates no unit. A unit, one head (`z`) or one of
`groups` runs of neighbouring neurons (`mlp_post`), is replaced at all tokens by zero (Michel et
al., 2019), by its mean over images at that step and token, or by what it is on another image
(`resample`; Chan et al., 2022). `statistic` says at which steps:

- `each`: at step t alone; `from`: at every step from t on; `all`: at every step;
- `sum`: the sum over t of the changes by `each`; `excess`: `all` less `sum`, 0 if single steps add
  up to all of them.

`value` is the change of what `answer` names, ablated less clean, mean over images of differences
within an image: `accuracy`, the true class's `logit` and its log-probability `log_prob` (which no
shift of all logits changes); `kl` is KL(clean || ablated). `null` of a head is the same with as
many random channels of `z`, drawn from all heads, the same at every step: what any ablation of that
width does. Groups of neurons are arbitrary: theirs is the mean over groups.

Which units matter when, of the table of `each` over steps and units, by a two-way analysis of
variance free of the images' noise (products of different tenths of the images): the shares
`variance_steps`, `variance_units` (the same units at every step) and `variance_both` (which unit
depends on the step). Their null shuffles the units within each step, as if a head's number meant
nothing from one step to the next: so it is in a stack, where head h of two blocks shares its number
alone. Large effects rule the shares; where the effects on images cancel (`accuracy`, `log_prob`)
they may be all noise, and their intervals then wide. `reliability` is the correlation between
halves of the images of the units' differences.

Runs start again from the clean state before the first ablated step. With a memory (bViT-fl, -sc)
the step's own block is ablated, its inner updates stay whole.

Cost: a unit and method take T (T + 1) / 2 applications of the block for `each` and one less than as
many for `from`, which has `all` in it: 155 for T = 12, 13 forwards; a forward for the means of each
image, of which `images` are then ablated. Of 1000 images of 32 px, 100 of them ablated, a bViT of
width 128 with four heads takes 4 minutes on one core (348 forwards an image ablated; scaled from 80
images). Computed from forwards, not measured: 8 minutes on two cores for width 256 and eight heads;
for bViT-B on ImageNet's 50,000 images 116,000 forwards, 5 minutes at 400 images a second. Expected:
no number is printed. Where a head is the same weights at every step, its main effect should be
above the null, in a stack at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.ablation import COLUMNS, Config, Scope
from bvit_interp.analyses.ablation.effects import ANSWERS, FOLDS, Ablator, steps_and_units
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.partners import Partners
from bvit_interp.data.samples import Samples, spread
from bvit_interp.metrics.streaming.means import MeanCI

_BYTES_OF_DONORS = 2**30


_SUMMARIES = ("variance_steps", "variance_units", "variance_both", "reliability")


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """What ablating every unit of every model does.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    classes = {name: label_map(data, model) for name, model in models.items()}
    ablators = {name: Ablator(model, config.groups, config.seed) for name, model in models.items()}
    ablated = replace(
        config, limit=min(x for x in (config.images, config.limit, len(data)) if x is not None)
    )
    wants_others = "resample" in config.methods
    partners = Partners(data, ablated.limit, config.skip_corrupt) if wants_others else None
    place = {index: i for i, index in enumerate(spread(len(data), ablated.limit))}
    tallies = {name: _Tally(ablator, config) for name, ablator in ablators.items()}
    if "mean" in config.methods:
        _take_means(models, ablators, data, config)
    loader, geometries = ablated.loader(data, models, "ablation")
    for batch in loader:
        for name, ablator in ablators.items():
            for part in _parts(batch, ablator.donor_bytes() if partners else 0):
                with torch.inference_mode():
                    tallies[name].take(part, place, classes[name], geometries[name], partners)
    rows = [{"model": name, **row} for name, tally in tallies.items() for row in tally.rows()]
    return (
        pd.DataFrame(rows).reindex(columns=list(COLUMNS)).astype({"step": "Int64", "unit": "Int64"})
    )


def _take_means(
    models: Mapping[str, VisionTransformer],
    ablators: Mapping[str, Ablator],
    data: Samples,
    config: Config,
) -> None:
    """The mean activations that mean ablation fills in, in a pass of its own."""
    means = {name: ablator.site_means() for name, ablator in ablators.items()}
    loader, geometries = config.loader(data, models, "ablation: means")
    for batch in loader:
        for name, ablator in ablators.items():
            with torch.inference_mode():
                parts = run_in_halves(
                    lambda part, a=ablator, g=geometries[name]: (
                        a.sums(part.views[g][0]),
                        len(part),
                    ),
                    batch,
                )
            for sums, count in parts:
                for site, total in sums.items():
                    means[name][site].update(total, count)
    for name, ablator in ablators.items():
        ablator.means = {site: metric.compute() for site, metric in means[name].items()}


def _parts(batch: Batch, image_bytes: int) -> Iterator[Batch]:
    """The batch in parts whose donors' activations take at most 1 GiB."""
    if len(batch) > 1 and image_bytes * len(batch) > _BYTES_OF_DONORS:
        for half in batch.half():
            yield from _parts(half, image_bytes)
    else:
        yield batch


class _Tally:
    """The changes of one model's answers, while images stream by."""

    def __init__(self, ablator: Ablator, config: Config) -> None:
        self.ablator, self.config, last = ablator, config, ablator.probe.num_steps
        steps = range(1, last + 1)
        of_scope = {
            "each": [(t, t) for t in steps],
            "from": [(t, last) for t in steps],
            "all": [(1, last)],
        }
        self.rows_of = [(scope, span) for scope in config.scopes for span in of_scope[scope]]
        self.spans = list(dict.fromkeys(span for _, span in self.rows_of))
        self.adds_up = {"each", "all"} <= set(config.scopes)
        self.kinds = [units.kind for units in ablator.units for _ in units.keep]
        shape = (
            len(config.methods),
            len(self.kinds),
            len(self.spans) + 2 * self.adds_up,
            len(ANSWERS),
        )
        self.whole, self.folds = (
            MeanCI(*shape).to(ablator.device),
            MeanCI(FOLDS, *shape).to(ablator.device),
        )

    def take(
        self,
        batch: Batch,
        place: Mapping[int, int],
        classes: Tensor,
        geometry: Geometry,
        partners: Partners | None,
    ) -> None:
        """Ablate every unit on the images of a batch."""

        def run(part: Batch) -> tuple[Tensor, Tensor]:
            donors = partners(part.index, geometry)[0] if partners else None
            images, labels = part.views[geometry][0], classes[part.labels]
            return part.index, self.ablator.effects(
                images, labels, self.config.methods, self.spans, donors
            )

        for index, changes in run_in_halves(run, batch):
            if self.adds_up:
                changes = torch.cat([changes, *self._sums(changes)], dim=3)
            self.whole.update(changes)
            of_folds = changes.new_full((len(changes), FOLDS, *changes.shape[1:]), math.nan)
            half = max(len(place) // 2, 1)  # an image and its partner lie in one fold
            fold = [place[int(i)] % half % FOLDS for i in index]
            of_folds[range(len(fold)), fold] = changes
            self.folds.update(of_folds)

    def _sums(self, changes: Tensor) -> list[Tensor]:
        """Of changes ``(B, M, U, S, 4)`` the sum over single steps, and what all at once do beyond
        it."""
        last = self.ablator.probe.num_steps
        single = [self.spans.index((t, t)) for t in range(1, last + 1)]
        total = changes[:, :, :, single].sum(3, keepdim=True)
        return [total, changes[:, :, :, [self.spans.index((1, last))]] - total]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of every unit, then of the table of single steps."""
        listed: list[tuple[str, int | None, int]] = [
            (scope, None if scope == "all" else span[0], self.spans.index(span))
            for scope, span in self.rows_of
        ]
        if self.adds_up:
            listed += [("sum", None, len(self.spans)), ("excess", None, len(self.spans) + 1)]
        whole = {key: values.numpy() for key, values in self.whole.compute().items()}
        folds = {key: values.numpy() for key, values in self.folds.compute().items()}
        for m, method in enumerate(self.config.methods):
            for kind in dict.fromkeys(kind for kind in self.kinds if kind != "null"):
                places = [i for i, each in enumerate(self.kinds) if each == kind]
                for a, answer in enumerate(ANSWERS):
                    keys = {"method": method, "kind": kind, "answer": answer}
                    for statistic, step, s in listed:
                        found = {key: values[m, :, s, a] for key, values in whole.items()}
                        null = found["value"][
                            self.kinds.index("null") if kind == "head" else places
                        ].mean()
                        for unit, i in enumerate(places):
                            values = {key: column[i] for key, column in found.items()}
                            yield (
                                keys
                                | {"statistic": statistic, "step": step, "unit": unit, "null": null}
                                | values
                            )
                    if "each" in self.config.scopes:
                        yield from (keys | row for row in self._table(folds, m, places, a))

    def _table(
        self, folds: Mapping[str, np.ndarray], m: int, places: list[int], a: int
    ) -> Iterator[dict[str, Any]]:
        """How the effects over steps and units part."""
        single = [self.spans.index((t, t)) for t in range(1, self.ablator.probe.num_steps + 1)]
        effects = folds["value"][:, m][:, places][:, :, single, a].swapaxes(1, 2)
        counts = folds["n"][:, m, 0, 0, a]
        found = steps_and_units(effects, counts, self.config.seed)
        for statistic, values in found.items():
            yield {"statistic": statistic, "n": int(np.sum(counts)), **values}


def main_method(frame: pd.DataFrame) -> str:
    """The method that is drawn."""
    return "mean" if (frame["method"] == "mean").any() else str(frame["method"].iloc[0])


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Of heads: how their KL parts, and each one's largest loss of log-probability."""
    heads = frame[frame["kind"] == "head"]
    scope = next(s for s in get_args(Scope) if (heads["statistic"] == s).any())
    main = heads[
        (heads["method"] == main_method(heads))
        & (heads["answer"] == "log_prob")
        & (heads["statistic"] == scope)
    ]
    largest = main.sort_values("value", kind="stable").drop_duplicates(["model", "unit"])
    table = heads["statistic"].isin(_SUMMARIES) & (heads["answer"] == "kl")
    return heads[table | heads.index.isin(largest.index)].drop(columns="kind")
