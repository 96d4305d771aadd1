"""Class selectivity: share of a unit's variance that lies between classes.

``eta^2 = SS_between / SS_total``, of one-way analysis of variance of the responses of each unit at
each step. It is ``(k - 1) / (n - 1)`` on average where labels are permuted (k classes, n images);
``(eta^2 - null) / (1 - null)`` is 0 there (epsilon squared, Kelley, 1935).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.stats import beta
from torch import Tensor

from bvit_interp.metrics.statistics import Z_95


@dataclass(frozen=True)
class Selectivity:
    """Class selectivity of every unit at every step.

    Attributes
    ----------
    eta_squared : 0..1; nan for a unit that does not vary.
    value : debiased eta^2, at most 1, slightly below 0 by chance; nan also if n <= k.
    null : mean of eta^2 under permuted labels, (k - 1) / (n - 1).
    classes, images : k and n.
    """

    eta_squared: Float[Tensor, "steps units"]
    value: Float[Tensor, "steps units"]
    null: float
    classes: int
    images: int

    def interval(self) -> tuple[Float[Tensor, "steps units"], Float[Tensor, "steps units"]]:
        """Ends of an approximate 95 % confidence interval of `value` over images.

        For normal responses. It adds the variance of a squared multiple correlation (Olkin & Finn,
        1995), which is 0 at 0, and the variance of eta^2 under permuted labels, that of a Beta
        variable.
        """
        n, k, share = self.images, self.classes, self.value.clamp(0, 1)
        a, b = (k - 1) / 2, (n - k) / 2
        variance = 4 * share * ((1 - share) * (n - k)).square() / max((n * n - 1) * (n + 3), 1)
        variance = variance + a * b / max((a + b) ** 2 * (a + b + 1), 1e-12)
        half = Z_95 * variance.clamp(min=0).sqrt() / (1 - self.null)
        return self.value - half, self.value + half

    def selective(self, threshold: float, level: float = 0.05) -> Bool[Tensor, "steps units"]:
        """Whether `value` is at least the threshold, and eta^2 is significant by the F test.

        Under permuted labels of normal responses eta^2 is Beta((k - 1) / 2, (n - k) / 2), which is
        the F test. `level` is divided by the number of units and steps (Bonferroni).
        """
        if not 1 < self.classes < self.images:
            return torch.zeros_like(self.value, dtype=torch.bool)
        a, b = (self.classes - 1) / 2, (self.images - self.classes) / 2
        critical = float(beta.isf(level / self.eta_squared.numel(), a, b))
        return (self.value >= threshold) & (self.eta_squared > critical)


def class_selectivity(
    sums: Float[Tensor, "classes steps units"],
    counts: Float[Tensor, " classes"],
    squares: Float[Tensor, "steps units"],
) -> Selectivity:
    """Class selectivity from sums.

    Parameters
    ----------
    sums : sum of the responses to the images of each class.
    counts : number of images of each class.
    squares : sum of the squared responses to all images.
    """
    n, k = int(counts.sum()), int((counts > 0).sum())
    common = sums.sum(0).square() / n
    total = squares - common
    # what is left of a difference of large numbers is rounding, not variance
    total = total.where(total > 1e-12 * squares, torch.nan)
    between = (sums.square() / counts.clamp(min=1)[:, None, None]).sum(0) - common
    eta_squared = between.div(total).clamp(0, 1)
    null = (k - 1) / (n - 1) if n > 1 else 0.0
    value = (eta_squared - null) / (1 - null) if n > k else torch.full_like(eta_squared, torch.nan)
    return Selectivity(eta_squared, value, null, k, n)
