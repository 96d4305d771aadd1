"""Streaming scores of a model under the gates of several conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.metrics.checks import check_finite
from bvit_interp.metrics.divergence import kl_divergence
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.metrics.streaming.scores import Classification


class GateScores:
    """Means over images of KL, accuracy and agreement, by condition.

    Parameters
    ----------
    num_classes : number of classes C.
    draws : number of variants of the gates of each condition, in order; V in all. The first
        condition is the reference of `excess`.
    device : device of the sums.
    """

    def __init__(self, num_classes: int, draws: Sequence[int], device: torch.device) -> None:
        self.draws = list(draws)
        self._whole = Classification(num_classes).to(device)
        self._means = MeanCI(len(self.draws), 3).to(device)
        self._excess = MeanCI(len(self.draws)).to(device)
        self._by_variant = MeanCI(sum(self.draws)).to(device)

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
        predicted = gated.argmax(-1)
        right, agrees = predicted == labels, predicted == whole.argmax(-1)
        values = torch.stack([kl, right.double(), agrees.double()], dim=-1)
        by_condition = [variants.mean(0) for variants in values.split(self.draws)]
        means = torch.stack(by_condition, dim=1)  # (batch, conditions, 3)
        self._means.update(means)
        self._excess.update(means[:, :, 0] - means[:, :1, 0])
        self._by_variant.update(kl.T)

    def compute(self) -> dict[str, Any]:
        """The scores over all images, on the CPU.

        Returns
        -------
        `whole`: the result of `Classification`. `kl`, `accuracy`, `agreement` and `excess` (KL
        minus that of the first condition, image by image): the result of `MeanCI`, each
        ``(conditions,)``. `kl_min` and `kl_max` over the draws, ``(conditions,)``.
        """
        means = self._means.compute()
        by_condition = self._by_variant.compute()["value"].split(self.draws)
        scores: dict[str, Any] = {
            "whole": self._whole.compute(),
            "excess": self._excess.compute(),
            "kl_min": torch.stack([draws.min() for draws in by_condition]),
            "kl_max": torch.stack([draws.max() for draws in by_condition]),
        }
        for i, name in enumerate(("kl", "accuracy", "agreement")):
            scores[name] = {key: values[:, i] for key, values in means.items()}
        return scores
