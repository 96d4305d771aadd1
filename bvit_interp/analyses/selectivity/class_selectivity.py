"""The life of a unit from its class means: selectivity, birth and death, changes of role,
reliability.

A unit's profile at a step is its mean answer to each class; see `probes.biographies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.stats import beta
from torch import Tensor

from bvit_interp.metrics.statistics import Z_95

SHARES = ("share_class", "share_step", "share_interaction")


@dataclass(frozen=True)
class Selectivity:
    """Share of a unit's variance over images that lies between classes, at every step.

    ``eta^2 = SS_between / SS_total`` is (k - 1) / (n - 1) on average where labels are permuted (k
    classes, n images); ``value = (eta^2 - null) / (1 - null)`` is 0 there (epsilon squared, Kelley,
    1935).

    Attributes
    ----------
    eta, value : ``(T, U)`` 0..1, and debiased, also just below 0; nan for a unit that does not
        vary, or n <= k.
    null : (k - 1) / (n - 1).
    classes, images : k and n.
    """

    eta: Tensor
    value: Tensor
    null: float
    classes: int
    images: int

    def interval(self) -> tuple[Tensor, Tensor]:
        """Approximate 95 % interval of `value` over images, both ``(T, U)``, for normal answers.

        The variance of a squared multiple correlation (Olkin & Finn, 1995) and, as that is 0 at 0,
        that of eta^2 under permuted labels, a Beta variable's.
        """
        n, k, share = self.images, self.classes, self.value.clamp(0, 1)
        a, b = (k - 1) / 2, (n - k) / 2
        variance = 4 * share * ((1 - share) * (n - k)).square() / max((n * n - 1) * (n + 3), 1)
        variance = variance + a * b / max((a + b) ** 2 * (a + b + 1), 1e-12)
        half = Z_95 * variance.clamp(min=0).sqrt() / (1 - self.null)
        return self.value - half, self.value + half

    def alive(self, threshold: float, level: float = 0.05) -> Tensor:
        """``(T, U)`` bool: `value` is at least the threshold, and eta^2 beyond chance by the F
        test.

        Bonferroni's correction is for all units and steps. Under permuted labels of normal answers
        eta^2 is Beta((k - 1) / 2, (n - k) / 2), which is the F test.
        """
        if not 1 < self.classes < self.images:
            return torch.zeros_like(self.value, dtype=torch.bool)

        a, b = (self.classes - 1) / 2, (self.images - self.classes) / 2
        return (self.value >= threshold) & (
            self.eta > float(beta.isf(level / self.eta.numel(), a, b))
        )


def selectivity(total: Tensor, count: Tensor, squares: Tensor) -> Selectivity:
    """From sums by class ``(C, T, U)``, images of each class ``(C,)`` and sums of squares ``(T,
    U)``."""
    n, k = int(count.sum()), int((count > 0).sum())
    common = total.sum(0).square() / n
    overall = squares - common
    overall = overall.where(
        overall > 1e-12 * squares, torch.nan
    )  # rounding of large numbers' difference varies not
    eta = (
        ((total.square() / count.clamp(min=1)[:, None, None]).sum(0) - common)
        .div(overall)
        .clamp(0, 1)
    )
    null = (k - 1) / (n - 1) if n > 1 else 0.0
    value = (eta - null) / (1 - null) if n > k else torch.full_like(eta, torch.nan)
    return Selectivity(eta, value, null, k, n)


def class_means(total: Tensor, count: Tensor) -> Tensor:
    """Means of the classes that have images, ``(C', T, U)``."""
    there = count > 0
    return total[there] / count[there][:, None, None]


def two_way(means: Tensor) -> Tensor:
    """Shares of class, step and interaction in the sum of squares of each unit's table of class
    means.

    ``m_ct = m + a_c + b_t + (ab)_ct``, every class and step weighing the same.

    Parameters
    ----------
    means : ``(C, T, U)``.

    Returns
    -------
    ``(3, U)``, each 0..1; their sum is 1; nan for a table that does not vary.
    """
    centred = means - means.mean((0, 1))
    of_class, of_step = centred.mean(1, keepdim=True), centred.mean(0, keepdim=True)
    parts = torch.stack(
        [
            (part.expand_as(centred)).square().sum((0, 1))
            for part in (of_class, of_step, centred - of_class - of_step)
        ]
    )
    return parts / parts.sum(0).where(
        centred.square().sum((0, 1)) > 1e-24 * means.square().sum((0, 1)), torch.nan
    )


def lives(alive: Tensor) -> dict[str, Tensor]:
    """`birth` and `death`, first and last step alive from 1 (nan if none), `lifetime`, steps alive;
    each ``(U,)``."""
    steps = torch.arange(1, len(alive) + 1, dtype=torch.float64)[:, None]
    birth = torch.where(alive, steps, torch.inf).amin(0)
    death = torch.where(alive, steps, -torch.inf).amax(0)
    ever = alive.any(0)
    return {
        "birth": birth.where(ever, torch.nan),
        "death": death.where(ever, torch.nan),
        "lifetime": alive.sum(0).double(),
    }


def roles(means: Tensor, alive: Tensor, null: bool = False) -> dict[str, Tensor]:
    """How a unit's profile changes over the steps at which it is alive, by Pearson's correlation
    over classes.

    Parameters
    ----------
    means : class means ``(C, T, U)``.
    alive : ``(T, U)``.
    null : of two steps, take at the later one the next unit's profile, of those alive there,
        instead of its own: what correlations are like if no role is kept.

    Returns
    -------
    ``(U,)`` each, nan without such a pair of steps: `role_change`, mean of 1 - r of successive
    steps, both alive; `role_change_ends`, 1 - r of the first and the last step alive; `stability`,
    mean r over all pairs of steps alive.
    """
    profiles = means - means.mean(0)
    norms = profiles.norm(dim=0)
    profiles = profiles / norms.where(norms > 1e-12 * means.norm(dim=0), torch.nan)
    later = _next_alive(profiles, alive) if null else profiles
    r = torch.einsum("csu,ctu->stu", profiles, later)
    steps = len(alive)
    pairs = (
        alive[:, None]
        & alive[None]
        & ~r.isnan()
        & torch.ones(steps, steps).triu(1).bool()[..., None]
    )
    successive = pairs & torch.ones(steps, steps).tril(1).bool()[..., None]
    of = lives(alive)
    ends = [(of[key].nan_to_num(1).long() - 1) for key in ("birth", "death")]
    r_ends = r[ends[0], ends[1], torch.arange(r.shape[-1])]
    return {
        "role_change": 1 - _mean_where(r, successive),
        "role_change_ends": (1 - r_ends).where(of["lifetime"] > 1, torch.nan),
        "stability": _mean_where(r, pairs),
    }


def _next_alive(profiles: Tensor, alive: Tensor) -> Tensor:
    """At every step, each alive unit's profile replaced by the next one's; nan for a unit alone, or
    not alive."""
    moved = torch.full_like(profiles, torch.nan)
    for t, there in enumerate(alive):
        units = there.nonzero()[:, 0]
        if len(units) > 1:
            moved[:, t, units] = profiles[:, t, units.roll(-1)]
    return moved


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the first two axes of the chosen ones; nan where none is."""
    count = chosen.sum((0, 1))
    return values.where(chosen, 0).sum((0, 1)) / count.where(count > 0, torch.nan)


def reliability(total: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Correlation of a unit's profile in one half of the images with its own, and with the next
    unit's, in the other.

    Each step's profile is centred over the classes, so that what all images share does not count.

    Parameters
    ----------
    total, count : sums ``(2, C, T, U)`` and images ``(2, C)`` of the halves; classes in both count.

    Returns
    -------
    `value` and `null` ``(U,)``, -1..1; nan where a profile does not vary.
    """
    both = (count > 0).all(0)
    if both.sum() < 2:
        nothing = torch.full(total.shape[-1:], torch.nan, dtype=torch.float64)
        return {"value": nothing, "null": nothing}
    tables = total[:, both] / count[:, both][..., None, None]
    tables = (tables - tables.mean(1, keepdim=True)).flatten(1, 2)
    first, second = tables / tables.norm(dim=1, keepdim=True)
    null = (
        (first * second.roll(-1, -1)).sum(0)
        if second.shape[-1] > 1
        else torch.full_like(first[0], torch.nan)
    )
    return {"value": (first * second).sum(0), "null": null}


@dataclass(frozen=True)
class Lives:
    """All that is found of the U units of one kind.

    Attributes
    ----------
    selectivity, random : by class, and by random group.
    alive : ``(T, U)`` bool.
    means : of the C' classes with images ``(C', T, U)``.
    classes : which these are ``(C',)`` int64.
    statistics : birth, death, lifetime, role_change, role_change_ends, stability, share_class,
        share_step, share_interaction, reliability: `value`, and `null` where there is one,
        ``(U,)``.
    """

    selectivity: Selectivity
    random: Selectivity
    alive: Tensor
    means: Tensor
    classes: Tensor
    statistics: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, sums: Mapping[str, Tensor], threshold: float) -> Lives:
        """From the sums of `biographies.Profiles`, and the least selectivity of a unit that is
        alive."""
        total, count, squares = sums["total"], sums["count"], sums["squares"]
        by_class, by_group = (total[:-1].sum(0), count[:-1].sum(0)), (total[-1], count[-1])
        found, random = (selectivity(*of, squares) for of in (by_class, by_group))
        alive, means = found.alive(threshold), class_means(*by_class)
        statistics = {key: {"value": value} for key, value in lives(alive).items()}
        kept, moved = roles(means, alive), roles(means, alive, null=True)
        statistics |= {key: {"value": kept[key], "null": moved[key]} for key in kept}
        shares = zip(SHARES, two_way(means), two_way(class_means(*by_group)), strict=True)
        statistics |= {key: {"value": value, "null": null} for key, value, null in shares}
        statistics["reliability"] = reliability(total[:-1], count[:-1])
        return cls(found, random, alive, means, by_class[1].nonzero()[:, 0], statistics)

    def order(self, key: str, largest: bool, lifetime: int) -> Tensor:
        """Units by a statistic, the first first; those without it, or alive at fewer steps, are not
        among them.

        Of equal values the more selective unit comes first.
        """
        value, by_peak = self.statistics[key]["value"], self._by_peak()
        listed = by_peak[
            ~value.isnan()[by_peak] & (self.statistics["lifetime"]["value"][by_peak] >= lifetime)
        ]
        return listed[value[listed].argsort(descending=largest, stable=True)]

    def first_of(self, lists: Mapping[str, bool], count: int, lifetime: int) -> list[int]:
        """The first `count` units of each list (statistic -> whether the largest comes first) that
        no list before has; where a list ends, the most selective units."""
        found: list[int] = []
        for key, largest in lists.items():
            candidates = [*self.order(key, largest, lifetime).tolist(), *self._by_peak().tolist()]
            found += [unit for unit in dict.fromkeys(candidates) if unit not in found][:count]
        return found

    def _by_peak(self) -> Tensor:
        return (
            self.selectivity.value.nan_to_num(-torch.inf)
            .amax(0)
            .argsort(descending=True, stable=True)
        )
