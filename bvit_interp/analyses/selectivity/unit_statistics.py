"""All statistics of the units of one site, and their ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bvit_interp.analyses.selectivity.class_selectivity import Selectivity, class_selectivity
from bvit_interp.analyses.selectivity.profiles import (
    class_means,
    profile_changes,
    reliability,
    selective_period,
    variance_shares,
    window_correlations,
    windows_of,
)

SHARES = ("share_class", "share_step", "share_interaction")


@dataclass(frozen=True)
class UnitStatistics:
    """Statistics of the U units of one site.

    Attributes
    ----------
    selectivity : selectivity for the classes.
    null_selectivity : selectivity for random groups of images.
    selective, null_selective : whether a unit is selective for them at a step.
    means : mean responses to the classes that have images.
    classes : numbers of these classes.
    metrics : onset, offset, lifetime, profile_change, profile_change_ends, profile_stability,
        share_class, share_step, share_interaction and reliability: `value`, and `null` where there
        is one, each ``(U,)``.
    windows : window -> `window_correlations`, each ``(T - window, U)``.
    """

    selectivity: Selectivity
    null_selectivity: Selectivity
    selective: Bool[Tensor, "steps units"]
    null_selective: Bool[Tensor, "steps units"]
    means: Float[Tensor, "present steps units"]
    classes: Int[Tensor, " present"]
    metrics: dict[str, dict[str, Float[Tensor, " units"]]]
    windows: Mapping[int, Mapping[str, Mapping[str, Float[Tensor, "starts units"]]]] = field(
        default_factory=dict
    )

    @classmethod
    def from_sums(cls, sums: Mapping[str, Tensor], threshold: float) -> UnitStatistics:
        """Statistics from the sums of `responses.ClassSums`.

        Parameters
        ----------
        threshold : least selectivity of a selective unit, 0..1.
        """
        total, count, squares = sums["total"], sums["count"], sums["squares"]
        class_sums, class_counts = total[:-1].sum(0), count[:-1].sum(0)
        selectivity = class_selectivity(class_sums, class_counts, squares)
        null_selectivity = class_selectivity(total[-1], count[-1], squares)
        selective = selectivity.selective(threshold)
        means = class_means(class_sums, class_counts)
        metrics = {key: {"value": value} for key, value in selective_period(selective).items()}
        changes = profile_changes(means, selective)
        null_changes = profile_changes(means, selective, null=True)
        for key, value in changes.items():
            metrics[key] = {"value": value, "null": null_changes[key]}
        null_shares = variance_shares(class_means(total[-1], count[-1]))
        for key, value, null in zip(SHARES, variance_shares(means), null_shares, strict=True):
            metrics[key] = {"value": value, "null": null}
        metrics["reliability"] = reliability(total[:-1], count[:-1])
        return cls(
            selectivity=selectivity,
            null_selectivity=null_selectivity,
            selective=selective,
            null_selective=null_selectivity.selective(threshold),
            means=means,
            classes=class_counts.nonzero()[:, 0],
            metrics=metrics,
            windows={
                window: window_correlations(total[:-1], count[:-1], selective, window)
                for window in windows_of(len(selective))
            },
        )

    def ranking(self, metric: str, largest: bool, min_lifetime: int) -> Int[Tensor, " ranked"]:
        """Units in the order of a metric; of equal values the more selective unit comes first.

        Parameters
        ----------
        metric : a key of `metrics`.
        largest : whether the largest value comes first.
        min_lifetime : units selective at fewer steps are left out, as are units without a value.
        """
        value, units = self.metrics[metric]["value"], self._by_peak()
        long_enough = self.metrics["lifetime"]["value"][units] >= min_lifetime
        units = units[~value.isnan()[units] & long_enough]
        return units[value[units].argsort(descending=largest, stable=True)]

    def first_of(self, ranked: Mapping[str, bool], count: int, min_lifetime: int) -> list[int]:
        """The first `count` units of each ranking that no ranking before has.

        Parameters
        ----------
        ranked : metric -> whether the largest value comes first. Where a ranking ends, the most
            selective units follow.
        """
        chosen: list[int] = []
        for metric, largest in ranked.items():
            ranking = self.ranking(metric, largest, min_lifetime).tolist()
            candidates = dict.fromkeys([*ranking, *self._by_peak().tolist()])
            chosen += [unit for unit in candidates if unit not in chosen][:count]
        return chosen

    def _by_peak(self) -> Tensor:
        """All units by their largest selectivity at any step, largest first."""
        peaks = self.selectivity.value.nan_to_num(-torch.inf).amax(0)
        return peaks.argsort(descending=True, stable=True)
