"""Accuracy and calibration of every model, in one pass over the images.

Tables 1-3, section 4.1 of bViT (arXiv 2605.10661) print top-1 accuracy. Beside it stand top-5
accuracy, the cross-entropy and the expected calibration error ``sum_m (n_m / n) |accuracy_m -
confidence_m|`` over equal-width bins of the largest softmax probability (Guo et al., ICML 2017; 15
bins as there). The paper does not say whether it scores raw or averaged (EMA) weights: the command
line scores both where a checkpoint has both. The nulls are `chance` and `top5_chance`, the shares
of the most frequent class and of the five most frequent classes among the images. Each model has a
row with `bin` = all, and one row for every bin that holds images: the reliability diagram.

Cost: one forward per image; 1000 images of 32 px and three models of width 128 take 20 s on one
core. Expected: in the paper 0.779 top-1 for bViT-B and 0.789 for ViT-B on ImageNet-1K; it prints no
calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from torch import Tensor

from bvit_interp.analyses.evaluate import COLUMNS, Config
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Scores of every model.

    Parameters
    ----------
    models : name -> model; all models see each image in one pass.
    data : labelled images of the models' classes.

    Returns
    -------
    A table of `COLUMNS`: first the row with `bin` = all of every model, then the bins.
    """
    # on the model's device from the start: a process without images takes part in the gather too
    metrics = {
        name: Classification(model.num_classes, config.bins).to(device_of(model))
        for name, model in models.items()
    }

    def classify(batch: ModelBatch) -> tuple[Tensor, Tensor]:
        return models[batch.model](batch.images), batch.labels

    for name, (logits, labels) in stream(
        models, data, config, classify, progress="evaluate", labels=True
    ):
        metrics[name].update(logits, labels)
    scores = {name: metric.compute() for name, metric in metrics.items()}
    rows = [_overall_row(name, of_model) for name, of_model in scores.items()]
    rows += [row for name, of_model in scores.items() for row in _bin_rows(name, of_model)]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows over all images, without the confidence bins."""
    return frame[frame["bin"] == "all"]


def _overall_row(name: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The row over all images."""
    low, high = wilson_interval(scores["accuracy"] * scores["n"], scores["n"])
    return {"model": name, "bin": "all", "low": low, "high": high} | {
        key: value for key, value in scores.items() if key in COLUMNS
    }


def _bin_rows(name: str, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each bin that holds images."""
    rows = []
    bins = zip(scores["bin_n"], scores["bin_confidence"], scores["bin_accuracy"], strict=True)
    for m, (n, confidence, accuracy) in enumerate(bins, start=1):
        if n:
            low, high = wilson_interval(accuracy * n, n)
            row = {"model": name, "bin": str(m), "n": n, "accuracy": accuracy}
            rows.append(row | {"low": low, "high": high, "confidence": confidence})
    return rows
