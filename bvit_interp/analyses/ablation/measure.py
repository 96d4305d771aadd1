"""Ablation of heads and groups of neurons, over spans of steps.

Ours; bViT (arXiv 2605.10661) ablates no unit. A unit is one head (site `z`) or one of `groups` runs
of neighbouring neurons (site `mlp_post`). At all tokens it is replaced by zero (Michel et al.,
2019), by its mean over images at that step and token, or by its value on another image (`resample`;
Chan et al., 2022). The column `scope` says at which steps:

- `each`: at step t alone; `from`: at every step from t on; `all`: at every step;
- `sum`: the sum over t of the changes of `each`; `excess`: `all` minus `sum`, which is 0 if the
  effects of single steps add up to the effect of all of them.

`value` is the change of the `metric`, ablated minus clean, as a mean over images of the difference
within an image: `accuracy`, the true class's `logit`, and its log-probability `log_prob` (which
does not change if all logits shift together). `kl` is KL(clean || ablated). The `null` of a head is
the same ablation with as many random channels of `z`, drawn from all heads and the same at every
step: the effect of any ablation of that width. Groups of neurons are arbitrary, so their null is
the mean over groups.

The effect of an ablation follows the size of the change that it makes, and this size differs by
orders of magnitude between steps. `norm_null` (ours) takes the size away from the comparison. For
each unit at each single step, intact runs go beside the ablated ones. There, what attention (for
heads) or the FFN (for neurons) adds to the residual stream is moved, in every token, by the norm of
the change that the ablation makes at that step and token. The direction is random: drawn per image,
unit and step, and the same for all tokens of the image, so that it does not cancel between tokens
(`norm_matched.py`). A unit whose `value` is far from its `norm_null` matters by what it writes; a
unit that is near it, by how much it writes. `norm_null` is a mean over the same images and over
`norm_draws` directions per image. It is empty for blocks that do not tell apart what attention and
FFN add.

Which units matter at which steps: a two-way analysis of variance of the table of `each` over steps
and units. It is cross-validated, so the noise of the images does not count (see `variance.py`). Its
shares are `variance_steps`, `variance_units` (the same units at every step) and
`variance_interaction` (which units matter depends on the step). The null shuffles the units within
each step, as if the number of a head had no meaning from one step to the next. In a stack it has
none: head h of two blocks shares the number alone. Where effects on
different images cancel (`accuracy`, `log_prob`) the shares may be noise, and their intervals are
then wide. `reliability` is the correlation of the differences between units in two halves of the
images: do units differ? `reliability_interaction` is that of the differences without their mean
over the steps: do these differences change from step to step? `p_holm` corrects for all of these
tests of a model (Holm, 1979).

Large effects dominate all of this. KL differs by orders of magnitude between steps, so its shares
see the largest steps alone. `log_kl` has the same statistics of the logarithm of KL, on which each
step counts as much as any other. It is the logarithm of the mean KL of a fold, not a mean of
logarithms: an image with a KL near 0 does not dominate it. A mean KL of a fold below 1e-9 nats,
which is what float32 rounds to, counts as 1e-9; nothing is left out. (The logarithm of a mean over
few images is too low by half the relative variance of that mean; this is much less than the
differences between steps.)

Runs start again from the clean state before the first ablated step. In a model with a memory
(bViT-fl, bViT-sc) the step's own block is ablated; its inner updates stay intact.

Cost: per unit and method, `each` takes T (T + 1) / 2 applications of the block, `norm_null` as many
again per draw, and `from`, which includes `all`, as many less one: 233 for T = 12, or 19 forwards.
Random channels take those without `norm_null`, 13 forwards. The means take one forward per image of
the data set; `n_ablated` of these images are then ablated. An ablated image takes 507 forwards of a
bViT with four heads (counted; 351 with ``norm_draws=0``) and 740 with eight. 1000 images of 32 px,
100 of them ablated, take a bViT of width 128 with four heads about 7 minutes on one core (4 without
`norm_null`; a model of eight heads took 1.7 times the CPU seconds with it, measured). Computed from
the number of forwards, not measured: 12 minutes on two cores for width 256 and eight heads; for
bViT-B on ImageNet's 50,000 images 147,000 forwards, 6 minutes at 400 images per second.

Expected: no number is printed. Where a head has the same weights at every step, its main effect
should be above the null; in a stack it should equal the null. A head that writes in random
directions should have a KL equal to its `norm_null`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.ablation import COLUMNS, Config, Scope, drawn_method
from bvit_interp.analyses.ablation.effects import METRICS, Ablator
from bvit_interp.analyses.ablation.variance import (
    FOLDS,
    cross_validated_anova,
    fold_numbers,
    holm,
    log_kl,
)
from bvit_interp.data.partners import Partners
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.looped import Model
from bvit_interp.models.unroll import for_any_model

_BYTES_OF_DONORS = 2**30
_ANOVA = (
    "variance_steps",
    "variance_units",
    "variance_interaction",
    "reliability",
    "reliability_interaction",
)


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Effects of ablating every unit of every model.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, in the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    ablators = {
        name: Ablator(model, config.groups, config.seed, config.norm_draws)
        for name, model in models.items()
    }
    limits = (config.n_ablated, config.limit, len(data))
    ablated = replace(config, limit=min(limit for limit in limits if limit is not None))
    partners, at_once = None, None
    if "resample" in config.methods:
        partners = Partners(data, ablated.limit, config.skip_corrupt)
        at_once = {
            name: _BYTES_OF_DONORS // ablator.donor_bytes() for name, ablator in ablators.items()
        }
    if "mean" in config.methods:
        ablators = _with_means(models, ablators, data, config)
    positions = evenly_spaced(len(data), ablated.limit)
    folds = dict(zip(positions, fold_numbers(len(positions)), strict=True))
    tallies = {name: _Tally(ablator, config) for name, ablator in ablators.items()}

    def effects(batch: ModelBatch) -> tuple[Tensor, Tensor]:
        return batch.index, ablators[batch.model].effects(
            batch.images,
            batch.labels,
            config.methods,
            tallies[batch.model].spans,
            batch.partner_images if partners else None,
            batch.index if tallies[batch.model].matched else None,
        )

    for name, (index, changes) in stream(
        models,
        data,
        ablated,
        effects,
        progress="ablation",
        labels=True,
        partners=partners,
        images_at_once=at_once,
    ):
        tallies[name].update(changes, [folds[position] for position in index.tolist()])
    rows = [{"model": name, **row} for name, tally in tallies.items() for row in tally.rows()]
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return frame.astype({"step": "Int64", "unit": "Int64"})


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """For heads: the analysis of variance of log KL, and each head's largest loss of
    log-probability, with its KL as a multiple of that of the random direction (`kl_ratio`)."""
    heads = frame[frame["site"] == "z"]
    scope = next(scope for scope in get_args(Scope) if (heads["scope"] == scope).any())
    drawn = heads[
        (heads["method"] == drawn_method(list(heads["method"]))) & (heads["scope"] == scope)
    ]
    keys, kl = ["model", "unit", "step"], drawn[drawn["metric"] == "kl"]
    ratio = kl.set_index(keys)["value"] / kl.set_index(keys)["norm_null"]
    losses = drawn[drawn["metric"] == "log_prob"].sort_values("value", kind="stable")
    largest = losses.drop_duplicates(["model", "unit"])
    of_table = heads["scope"].isin(_ANOVA) & (heads["metric"] == "log_kl")
    shown = heads[of_table | heads.index.isin(largest.index)].drop(columns="site")
    at_losses = ratio.reindex(pd.MultiIndex.from_frame(largest[keys])).to_numpy()
    return shown.assign(kl_ratio=pd.Series(at_losses, largest.index))


def _with_means(
    models: Mapping[str, Model],
    ablators: Mapping[str, Ablator],
    data: Samples,
    config: Config,
) -> dict[str, Ablator]:
    """Ablators with the mean activations over all images, from a pass of its own."""
    means = {name: ablator.empty_means() for name, ablator in ablators.items()}

    def sums(batch: ModelBatch) -> tuple[dict[str, Tensor], int]:
        return ablators[batch.model].clean_sums(batch.images), len(batch)

    # with labels, so that classes that do not match are refused before this pass
    for name, (totals, count) in stream(
        models, data, config, sums, progress="ablation: means", labels=True
    ):
        for site, total in totals.items():
            means[name][site].update(total, count)
    return {
        name: ablator.with_means({site: mean.compute() for site, mean in means[name].items()})
        for name, ablator in ablators.items()
    }


class _Tally:
    """Streaming means of one model's effects, over all images and over each fold."""

    def __init__(self, ablator: Ablator, config: Config) -> None:
        self.config, self.units = config, ablator.units
        self.last = last = ablator.probe.num_steps
        steps = range(1, last + 1)
        spans = {
            "each": [(step, step) for step in steps],
            "from": [(step, last) for step in steps],
            "all": [(1, last)],
        }
        self.scopes = [(scope, span) for scope in config.scopes for span in spans[scope]]
        self.spans = list(dict.fromkeys(span for _, span in self.scopes))
        is_matched = "each" in config.scopes and config.norm_draws > 0
        self.matched = [span for span in self.spans if span[0] == span[1]] if is_matched else []
        self.adds_up = {"each", "all"} <= set(config.scopes)
        variants = sum(len(units.keep) for units in self.units)
        columns = len(self.spans) + len(self.matched) + 2 * self.adds_up
        shape = (len(config.methods), variants, columns, len(METRICS))
        self.whole = MeanCI(*shape).to(ablator.device)
        self.by_fold = MeanCI(FOLDS, *shape).to(ablator.device)

    def update(self, changes: Tensor, folds: Sequence[int]) -> None:
        """Add effects ``(B, methods, units, spans, metrics)`` of images in these folds."""
        if self.adds_up:
            changes = torch.cat([changes, *self._sum_and_excess(changes)], dim=3)
        self.whole.update(changes)
        by_fold = changes.new_full((len(changes), FOLDS, *changes.shape[1:]), math.nan)
        by_fold[range(len(folds)), folds] = changes
        self.by_fold.update(by_fold)

    def _sum_and_excess(self, changes: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over single steps, and the effect of all steps at once beyond it."""
        total = changes[:, :, :, self._single_steps()].sum(3, keepdim=True)
        return total, changes[:, :, :, [self.spans.index((1, self.last))]] - total

    def _single_steps(self) -> list[int]:
        return [self.spans.index((step, step)) for step in range(1, self.last + 1)]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of every unit, then of the analysis of variance, by method, site and metric."""
        whole = {key: values.numpy() for key, values in self.whole.compute().items()}
        folds = {key: values.numpy() for key, values in self.by_fold.compute().items()}
        rows = []
        for m, method in enumerate(self.config.methods):
            for site in dict.fromkeys(units.site for units in self.units):
                for a, metric in enumerate(METRICS):
                    keys = {"method": method, "site": site, "metric": metric}
                    chosen = {key: values[m, :, :, a] for key, values in whole.items()}
                    rows += [keys | row for row in self._unit_rows(chosen, site)]
                    if "each" in self.config.scopes:
                        effects = folds["value"][:, m, :, :, a]
                        counts = folds["n"][:, m, 0, 0, a]
                        rows += [keys | row for row in self._anova_rows(effects, counts, site)]
                        if metric == "kl":
                            keys, logs = keys | {"metric": "log_kl"}, log_kl(effects)
                            rows += [keys | row for row in self._anova_rows(logs, counts, site)]
        tests = [row for row in rows if "p_value" in row]
        adjusted = holm(np.array([row["p_value"] for row in tests], dtype=float))
        for row, p_value in zip(tests, adjusted.tolist(), strict=True):
            row["p_holm"] = p_value
        return rows

    def _unit_rows(self, whole: Mapping[str, np.ndarray], site: str) -> Iterator[dict[str, Any]]:
        """Rows of every scope and unit, of means ``(units, spans)`` and their intervals."""
        columns: list[tuple[str, int | None, int]] = [
            (scope, None if scope == "all" else span[0], self.spans.index(span))
            for scope, span in self.scopes
        ]
        if self.adds_up:
            after = len(self.spans) + len(self.matched)
            columns += [("sum", None, after), ("excess", None, after + 1)]
        variants = self._variants(site)
        nulls = self._variants(site, null=True) or variants
        for scope, step, column in columns:
            null = whole["value"][nulls, column].mean()
            for unit, variant in enumerate(variants):
                row = {key: each[variant, column] for key, each in whole.items()}
                if scope == "each" and step is not None and self.matched:
                    matched = len(self.spans) + self.matched.index((step, step))
                    row["norm_null"] = whole["value"][variant, matched]
                yield {"scope": scope, "step": step, "unit": unit, "null": null, **row}

    def _anova_rows(
        self, effects: np.ndarray, counts: np.ndarray, site: str
    ) -> Iterator[dict[str, Any]]:
        """Rows of the table of single steps, of fold means ``(folds, variants, columns)`` and the
        images per fold."""
        chosen = effects[:, self._variants(site)][:, :, self._single_steps()].swapaxes(1, 2)
        table = cross_validated_anova(chosen, counts, self.config.seed)
        for scope, values in table.items():
            yield {"scope": scope, "n": int(np.sum(counts)), **values}

    def _variants(self, site: str, null: bool = False) -> list[int]:
        """Positions of the units of a site, or of its null, among all variants."""
        listed = [(units.site, units.is_null) for units in self.units for _ in units.keep]
        return [position for position, each in enumerate(listed) if each == (site, null)]
