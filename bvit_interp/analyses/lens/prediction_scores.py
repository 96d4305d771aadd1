"""Scores of the predictions of a lens, each with its null."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.analyses.lens.image_pairs import ImagePairs
from bvit_interp.metrics.divergence import kl_divergence
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.metrics.streaming.predictions import StepPredictions
from bvit_interp.metrics.streaming.scores import Classification

Scores = dict[str, dict[str, Tensor]]
"""Metric -> `value`, `null`, and where it is a mean over images `low`, `high` and `n`: ``(T,)``
each."""

_MEANS = ("accuracy", "agreement", "kl", "flips")  # means over images, with an interval


class PredictionScores:
    """Predictions of one lens on one group of tokens after every step, against the labels and the
    model's final prediction.

    The number of an image is the mean over its tokens; intervals are over images. Everything is in
    torchmetrics, on `device` from the start: a process without images takes part in the gather too.

    Parameters
    ----------
    steps, classes : T and C.
    device : where the logits will be.
    """

    def __init__(self, steps: int, classes: int, device: torch.device) -> None:
        self.classes = classes
        self._means = MeanCI(len(_MEANS), steps).to(device)
        self._predictions = StepPredictions(steps, classes).to(device)
        self._per_step = [Classification(classes).to(device) for _ in range(steps)]
        self._likelihood = ImagePairs(steps, classes).to(device)
        self._agreement = ImagePairs(steps, classes).to(device)

    def update(
        self,
        logits: Float[Tensor, "steps batch tokens classes"],
        final: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"],
    ) -> None:
        """Add a batch: the logits of the lens, the model's own logits, and the labels."""
        token_labels = labels[:, None].expand(-1, logits.shape[2]).flatten()
        for metric, of_step in zip(self._per_step, logits.flatten(1, 2), strict=True):
            metric.update(of_step, token_labels)
        self._predictions.update(logits.flatten(1, 2), token_labels)
        predicted, final_predicted = logits.argmax(-1), final.argmax(-1)
        final, logits = final.double(), logits.double()
        self._means.update(
            torch.stack(
                [
                    _share_equal(predicted, labels),
                    _share_equal(predicted, final_predicted),
                    kl_divergence(final[None, :, None], logits).mean(2).T,
                    _share_changed(predicted),
                ],
                1,
            )
        )
        self._likelihood.update(final.softmax(-1), logits.log_softmax(-1).mean(2).transpose(0, 1))
        shares = F.one_hot(predicted, self.classes).double().mean(2).transpose(0, 1)
        self._agreement.update(F.one_hot(final_predicted, self.classes), shares)

    def compute(self) -> Scores:
        """All metrics over all processes, on the CPU."""
        means, steps = self._means.compute(), len(self._per_step)
        per_step = [metric.compute() for metric in self._per_step]
        along = {key: values.cpu() for key, values in self._predictions.compute().items()}
        likelihood, agreement = self._likelihood.compute(), self._agreement.compute()
        scores: Scores = {
            name: {key: means[key][i] for key in ("value", "low", "high", "n")}
            for i, name in enumerate(_MEANS)
        }
        kl_null = scores["kl"]["value"] + likelihood["same_image"] - likelihood["other_images"]
        scores["accuracy"]["null"] = _column(per_step, "chance")
        scores["agreement"]["null"] = agreement["other_images"]
        scores["kl"]["null"] = kl_null
        scores["flips"]["null"] = along["flips_null"]
        scores["calibration_error"] = {
            "value": _column(per_step, "calibration_error"),
            "null": torch.tensor([sampling_error(each) for each in per_step], dtype=torch.float64),
        }
        scores["confidence"] = {"value": _column(per_step, "confidence")}
        scores["entropy"] = {
            "value": along["entropy"],
            "null": torch.full((steps,), math.log(self.classes), dtype=torch.float64),
        }
        scores["true_rank"] = {
            "value": along["true_rank"],
            "null": torch.full((steps,), (self.classes + 1) / 2, dtype=torch.float64),
        }
        return along_steps(scores)


def along_steps(scores: Scores) -> Scores:
    """The scores as ``(T,)``: torchmetrics makes a scalar of the only number of a single step."""
    return {
        name: {key: values.reshape(-1) for key, values in parts.items()}
        for name, parts in scores.items()
    }


def sampling_error(score: dict[str, Any]) -> float:
    """Calibration error expected of perfectly calibrated predictions, from their number alone.

    In a bin of n predictions of confidence c it is the normal mean absolute deviation ``sqrt(2 n c
    (1 - c) / pi)``.

    Parameters
    ----------
    score : the result of `Classification.compute`.
    """
    variances = (
        n * c * (1 - c) for n, c in zip(score["bin_n"], score["bin_confidence"], strict=True) if n
    )
    deviations = sum(math.sqrt(2 * max(variance, 0.0) / math.pi) for variance in variances)
    return deviations / sum(score["bin_n"])


def _column(per_step: list[dict[str, Any]], key: str) -> Tensor:
    return torch.tensor([scores[key] for scores in per_step], dtype=torch.float64)


def _share_equal(predicted: Tensor, classes: Tensor) -> Tensor:
    """Share of an image's tokens that predict its class of `classes` ``(B,)``: ``(B, T)``."""
    return (predicted == classes[:, None]).double().mean(-1).T


def _share_changed(predicted: Tensor) -> Tensor:
    """Share of an image's tokens whose prediction differs from the previous step's: ``(B, T)``, nan
    at step 1."""
    changed = (predicted[1:] != predicted[:-1]).double().mean(-1)
    return torch.cat([changed.new_full((1, predicted.shape[1]), torch.nan), changed]).T
