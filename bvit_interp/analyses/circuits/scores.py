"""Streaming scores of a model under the gates of several conditions.

A condition whose gates are drawn at random is scored as the mean over D draws, each on the same n
images. Both are samples, so the interval of the mean covers both: it is the mean -+ t sqrt(s_D^2 /
D + s_n^2 / n), with s_D the standard deviation of the D means over images, s_n that of the n means
over draws, and t the quantile of Student's t with min(D, n) - 1 degrees of freedom. This is the sum
of the variance of the draws and that of the images, for a table of two crossed random factors. The
interaction of the two is in both terms, and the degrees of freedom are the smaller ones, so the
interval is rather too wide than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.analyses.circuits.conditions import DRAWN
from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.divergence import kl_divergence
from bvit_interp.metrics.statistics import Z_95, t_95
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.metrics.streaming.scores import Classification

MEASURES = ("kl", "excess", "accuracy", "agreement")
FEWEST_DRAWS = 3
"""Draws that an interval needs: two have no spread to speak of."""

Score = dict[str, float]
"""`value`, `low` and `high` of a mean."""


class GateScores:
    """Means over images of KL, excess, accuracy and agreement, by condition and by draw.

    Parameters
    ----------
    num_classes : number of classes C.
    variants : condition -> number of variants of its gates, in order; V in all. The first condition
        is the reference of `excess`.
    device : device of the sums.
    """

    def __init__(self, num_classes: int, variants: Mapping[str, int], device: torch.device) -> None:
        self.variants = dict(variants)
        self._counts = list(self.variants.values())
        self._whole = Classification(num_classes).to(device)
        self._by_condition = MeanCI(len(self._counts), len(MEASURES)).to(device)
        self._by_variant = MeanCI(sum(self._counts), len(MEASURES)).to(device)

    def update(
        self,
        whole: Float[Tensor, "batch classes"],
        gated: Float[Tensor, "variants batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> None:
        """Add a batch: logits of the whole model, logits under every table of gates, labels."""
        self._whole.update(whole, labels)
        check_finite(gated, "logits")
        kl = kl_divergence(whole.double()[None], gated.double())
        excess = kl - kl[: self._counts[0]].mean(0)
        predicted = gated.argmax(-1)
        right, agrees = predicted == labels, predicted == whole.argmax(-1)
        values = torch.stack([kl, excess, right.double(), agrees.double()], dim=-1)
        by_condition = [variants.mean(0) for variants in values.split(self._counts)]
        self._by_condition.update(torch.stack(by_condition, dim=1))
        self._by_variant.update(values.transpose(0, 1))

    def compute(self) -> dict[str, Any]:
        """The scores over all images.

        Returns
        -------
        `whole` : the result of `Classification`.
        `conditions` : condition -> measure -> `Score` of the mean over images and draws. The
            interval of a condition of random gates is `over_draws`, of any other normal over
            images.
        `draws` : condition of random gates -> for each draw, measure -> `Score`, normal over
            images.

        `excess` is the KL minus that of the first condition, image by image.
        """
        means, variants = self._by_condition.compute(), self._by_variant.compute()
        conditions, draws, begin = {}, {}, 0
        for i, (condition, count) in enumerate(self.variants.items()):
            of_condition = _scores(means, i)
            if condition in DRAWN:
                own = [_scores(variants, row) for row in range(begin, begin + count)]
                draws[condition] = own
                of_condition = {
                    measure: over_draws(
                        score,
                        [each[measure]["value"] for each in own],
                        int(means["n"][i, 0]),
                    )
                    for measure, score in of_condition.items()
                }
            conditions[condition] = of_condition
            begin += count
        return {"whole": self._whole.compute(), "conditions": conditions, "draws": draws}


def over_draws(over_images: Score, draws: Sequence[float], images: int) -> Score:
    """A mean over draws and images, with a 95 % confidence interval that covers both.

    Parameters
    ----------
    over_images : the mean of n images, each the mean over D draws; a normal interval over images.
    draws : the means over images of each draw.
    images : n.

    Returns
    -------
    The ends are nan for fewer than `FEWEST_DRAWS` draws or two images.
    """
    value, count = over_images["value"], len(draws)
    if count < FEWEST_DRAWS or images < 2:
        return {"value": value, "low": math.nan, "high": math.nan}
    of_draws = float(torch.tensor(draws, dtype=torch.float64).var()) / count
    of_images = ((over_images["high"] - value) / Z_95) ** 2
    half = t_95(min(count, images) - 1) * math.sqrt(of_draws + of_images)
    return {"value": value, "low": value - half, "high": value + half}


def _scores(means: Mapping[str, Tensor], row: int) -> dict[str, Score]:
    """Measure -> `Score`, from a row of the result of `MeanCI`."""
    return {
        measure: {key: float(means[key][row, i]) for key in ("value", "low", "high")}
        for i, measure in enumerate(MEASURES)
    }
