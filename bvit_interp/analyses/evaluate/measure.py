"""How often is the model right, and how well does it know?

Tables 1-3, section 4.1 of bViT (arXiv 2605.10661) print top-1 accuracy; beside it stand top-5, the
cross-entropy and the expected calibration error ``sum_m (n_m / n) |accuracy_m - confidence_m|``
over bins of equal width of the largest softmax probability (Guo et al., ICML 2017; 15 bins as
there). Whether the paper scores raw or averaged (EMA) weights it does not say: the command line
scores both where a checkpoint has both. The nulls are `chance` and `chance5`, the shares of the
most frequent class and of the five most frequent among the images. Each model has a row `bin` = all
and one for every bin that holds images: the reliability diagram.

Cost: one forward an image; 1000 images of 32 px and three models of width 128 take 20 s on one
core. Expected: in the paper 0.779 top-1 for bViT-B and 0.789 for ViT-B on ImageNet-1K; it prints no
calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.analyses.evaluate import COLUMNS, Config
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.scores import Classification


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Scores of every model.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes.

    Returns
    -------
    A table of `COLUMNS`: first the row `bin` = all of every model, then their bins.
    """
    classes = {name: label_map(data, model) for name, model in models.items()}
    # on the model's device from the start: a process without images takes part in the gather too
    scores = {
        name: Classification(model.num_classes, config.bins).to(next(model.parameters()).device)
        for name, model in models.items()
    }
    loader, geometries = config.loader(data, models, "evaluate")
    for batch in loader:
        for name, model in models.items():
            parts = run_in_halves(
                lambda part, name=name, model=model: (
                    _logits(model, part.views[geometries[name]][0]),
                    classes[name][part.labels],
                ),
                batch,
            )
            for logits, labels in parts:
                scores[name].update(logits, labels.to(logits.device))
    found = {name: metric.compute() for name, metric in scores.items()}
    rows = [_row(name, of_model) for name, of_model in found.items()]
    rows += [row for name, of_model in found.items() for row in _bin_rows(name, of_model)]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def _logits(model: VisionTransformer, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images.to(next(model.parameters()).device))


def _row(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The row over all images."""
    low, high = wilson_interval(found["top1"] * found["n"], found["n"])
    return {"model": name, "bin": "all", "low": low, "high": high} | {
        key: value for key, value in found.items() if key in COLUMNS
    }


def _bin_rows(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    bins = zip(found["bin_n"], found["bin_confidence"], found["bin_accuracy"], strict=True)
    for m, (n, confidence, accuracy) in enumerate(bins, start=1):
        if n:
            low, high = wilson_interval(accuracy * n, n)
            rows.append(
                {
                    "model": name,
                    "bin": str(m),
                    "n": n,
                    "top1": accuracy,
                    "low": low,
                    "high": high,
                    "confidence": confidence,
                }
            )
    return rows


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the bins of calibration."""
    return frame[frame["bin"] == "all"]
