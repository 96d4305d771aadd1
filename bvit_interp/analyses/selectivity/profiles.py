"""Profiles of class means: when they are selective, how they change.

The profile of a unit at a step is its mean response to each class, ``m_ct`` of class c and step t.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MIN_RELIABILITY = 0.3
"""Least correlation of the halves of the images for which noise is corrected."""


def class_means(
    sums: Float[Tensor, "classes steps units"], counts: Float[Tensor, " classes"]
) -> Float[Tensor, "present steps units"]:
    """Mean responses to the classes that have images."""
    present = counts > 0
    return sums[present] / counts[present][:, None, None]


def variance_shares(means: Float[Tensor, "classes steps units"]) -> Float[Tensor, "3 units"]:
    """Shares of class, step and interaction in the variance of each unit's table of class means.

    ``m_ct = m + a_c + b_t + (ab)_ct``, where each class and each step has the same weight.

    Returns
    -------
    Three shares of the sum of squares, each 0..1; their sum is 1. nan for a table that does not
    vary.
    """
    centred = means - means.mean((0, 1))
    class_effect, step_effect = centred.mean(1, keepdim=True), centred.mean(0, keepdim=True)
    effects = (class_effect, step_effect, centred - class_effect - step_effect)
    squares = torch.stack([effect.expand_as(centred).square().sum((0, 1)) for effect in effects])
    varies = centred.square().sum((0, 1)) > 1e-24 * means.square().sum((0, 1))
    return squares / squares.sum(0).where(varies, torch.nan)


def selective_period(selective: Bool[Tensor, "steps units"]) -> dict[str, Float[Tensor, " units"]]:
    """When each unit is selective.

    Returns
    -------
    `onset` and `offset`, the first and the last step at which it is selective, from 1 (nan if there
    is none); `lifetime`, the number of steps at which it is selective.
    """
    steps = torch.arange(1, len(selective) + 1, dtype=torch.float64)[:, None]
    onset = torch.where(selective, steps, torch.inf).amin(0)
    offset = torch.where(selective, steps, -torch.inf).amax(0)
    ever = selective.any(0)
    return {
        "onset": onset.where(ever, torch.nan),
        "offset": offset.where(ever, torch.nan),
        "lifetime": selective.sum(0).double(),
    }


def profile_changes(
    means: Float[Tensor, "classes steps units"],
    selective: Bool[Tensor, "steps units"],
    null: bool = False,
) -> dict[str, Float[Tensor, " units"]]:
    """How the profile of each unit changes over the steps at which it is selective.

    r is Pearson's correlation of two profiles over the classes.

    Parameters
    ----------
    null : at the later of two steps, take the profile of the next unit that is selective there
        instead of the unit's own: the correlations if no profile were kept.

    Returns
    -------
    `profile_change`, mean of 1 - r over successive steps, both selective; `profile_change_ends`,
    1 - r of onset and offset; `profile_stability`, mean of r over all pairs of selective steps. nan
    for a unit without such a pair.
    """
    profiles = means - means.mean(0)
    norms = profiles.norm(dim=0)
    profiles = profiles / norms.where(norms > 1e-12 * means.norm(dim=0), torch.nan)
    later = _profiles_of_next(profiles, selective) if null else profiles
    r = torch.einsum("csu,ctu->stu", profiles, later)
    ordered = torch.ones(len(selective), len(selective), dtype=torch.bool).triu(1)
    pairs = selective[:, None] & selective[None] & ~r.isnan() & ordered[..., None]
    successive = pairs & ordered.tril(1)[..., None]
    period = selective_period(selective)
    first, last = (period[key].nan_to_num(1).long() - 1 for key in ("onset", "offset"))
    r_ends = r[first, last, torch.arange(r.shape[-1])]
    return {
        "profile_change": 1 - _mean_where(r, successive),
        "profile_change_ends": (1 - r_ends).where(period["lifetime"] > 1, torch.nan),
        "profile_stability": _mean_where(r, pairs),
    }


def reliability(
    sums: Float[Tensor, "2 classes steps units"], counts: Float[Tensor, "2 classes"]
) -> dict[str, Float[Tensor, " units"]]:
    """Split-half reliability of the profiles of all steps.

    The mean over classes is taken out at each step, so that what all images share does not count.
    Only classes with images in both halves are used.

    Parameters
    ----------
    sums, counts : sums of responses and numbers of images by class, in each half of the images.

    Returns
    -------
    `value`, the correlation of a unit's profile in the first half with its own profile in the
    second; `null`, with the profile of the next unit. nan where a profile does not vary.
    """
    both = (counts > 0).all(0)
    undefined = torch.full(sums.shape[-1:], torch.nan, dtype=torch.float64)
    if both.sum() < 2:
        return {"value": undefined, "null": undefined}
    tables = sums[:, both] / counts[:, both][..., None, None]
    tables = (tables - tables.mean(1, keepdim=True)).flatten(1, 2)
    first, second = tables / tables.norm(dim=1, keepdim=True)
    several = second.shape[-1] > 1
    null = (first * second.roll(-1, -1)).sum(0) if several else undefined
    return {"value": (first * second).sum(0), "null": null}


def windows_of(steps: int) -> list[int]:
    """Windows that profiles are compared over: 1, T / 2 and T - 1 steps, none twice."""
    return sorted({window for window in (1, steps // 2, steps - 1) if 1 <= window < steps})


def window_correlations(
    sums: Float[Tensor, "2 classes steps units"],
    counts: Float[Tensor, "2 classes"],
    selective: Bool[Tensor, "steps units"],
    window: int,
) -> Mapping[str, dict[str, Float[Tensor, "starts units"]]]:
    """Correlation of the profiles of steps s and s + window, as seen and corrected for noise.

    Noise of the images lowers a correlation, and noise of the same images at two steps is shared.
    So one profile comes from one half of the images and the other from the other half: ``r =
    (r(A_s, B_t) + r(B_s, A_t)) / 2`` for halves A and B and t = s + window. Corrected for noise it
    is ``r / sqrt(R_s R_t)``, with the reliability ``R_s = r(A_s, B_s)`` of a half (Spearman, 1904);
    it may exceed 1 by chance.

    Parameters
    ----------
    sums, counts : as for `reliability`.

    Returns
    -------
    `raw` and `corrected`: `value`, and `null`, where the profile at the later step is that of the
    next unit that has a value, with its reliability. nan where a unit is not selective at both
    steps, or a reliability is below `MIN_RELIABILITY`: there the quotient is mostly noise, and it
    is not defined for one that is not above 0. At least three classes must have images in both
    halves.
    """
    steps, units = selective.shape
    both = (counts > 0).all(0)
    undefined = torch.full((steps - window, units), torch.nan, dtype=torch.float64)
    found = {key: {"value": undefined, "null": undefined} for key in ("raw", "corrected")}
    if both.sum() < 3:
        return found
    profiles = sums[:, both] / counts[:, both][..., None, None]
    profiles = profiles - profiles.mean(1, keepdim=True)
    profiles = profiles / profiles.norm(dim=1, keepdim=True)
    reliable = (profiles[0] * profiles[1]).sum(0)
    early, late = slice(None, steps - window), slice(window, None)
    has_value = (selective & (reliable >= MIN_RELIABILITY))[early]
    has_value &= (selective & (reliable >= MIN_RELIABILITY))[late]
    partner = torch.arange(units).expand(steps - window, -1).clone()
    for row, present in zip(partner, has_value, strict=True):
        chosen = present.nonzero()[:, 0]
        row[chosen] = chosen.roll(-1)
    own = torch.arange(units).expand_as(partner)
    for column, other in (("value", own), ("null", partner)):
        defined = has_value if column == "value" else has_value & (partner != own)
        later = profiles[:, :, late].gather(3, other.expand(2, int(both.sum()), -1, -1))
        r = (profiles[:, :, early] * later.flip(0)).sum(1).mean(0)
        scale = (reliable[early] * reliable[late].gather(1, other)).sqrt()
        for key, values in (("raw", r), ("corrected", r / scale)):
            found[key] = found[key] | {column: values.where(defined, torch.nan)}
    return found


def _profiles_of_next(profiles: Tensor, selective: Tensor) -> Tensor:
    """At each step, the profile of the next selective unit; nan if there is no other."""
    shifted = torch.full_like(profiles, torch.nan)
    for t, selective_now in enumerate(selective):
        units = selective_now.nonzero()[:, 0]
        if len(units) > 1:
            shifted[:, t, units] = profiles[:, t, units.roll(-1)]
    return shifted


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values over the first two axes; nan where none is chosen."""
    count = chosen.sum((0, 1))
    return values.where(chosen, 0).sum((0, 1)) / count.where(count > 0, torch.nan)
