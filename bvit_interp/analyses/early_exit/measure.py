"""Accuracy, FLOPs and time of images that leave once confident.

Table 5 and Appendix B of bViT (arXiv 2605.10661): classifiers read CLS after chosen steps of the
frozen model (`bvit-interp early-exit train`); an image leaves at the first whose confidence ``max
softmax`` exceeds the threshold tau, else it gets the prediction of the model's own head after step
T. FLOPs are those of the steps run and the classifiers read, in both conventions. Time is measured:
the same images in a run that drops those that left, and in a plain forward, in turns. The null of
an accuracy is `accuracy_null`: as many images leave at each exit, but drawn at random, not by
confidence. The null of `auroc` is 0.5. The paper does not print its thresholds and exits: ours are
options.

Cost: one forward per image, and for the times up to one forward of the `n_timed` images per
threshold; 10,000 images of 32 px at width 128 take 2 min on one core, times included. Expected: in
the paper bViT-B keeps 0.776 of 0.779 at 27.3 of 33.7 GFLOPs, 19 % less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from bvit_interp.analyses.early_exit import COLUMNS, Config
from bvit_interp.analyses.early_exit.timing import exit_times
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.exits import exit_positions, random_exit_accuracy
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.cost import flops
from bvit_interp.models.exits import FILE, Exits, check_exits, exit_logits
from bvit_interp.models.looped import CalledSteps, Model
from bvit_interp.models.unroll import for_any_model, unroll

CURVE = tuple(i / 50 for i in range(51))
_BINS = 15  # of the calibration error


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Accuracy, FLOPs and time of every threshold, and the quality of every exit.

    Parameters
    ----------
    models : name -> `BViT` or stacked timm `VisionTransformer`; others are refused. All models see
        each image in one pass.
    data : labelled images, not those the exits were trained on.

    Returns
    -------
    A table of `COLUMNS`.
    """
    exits = _load_exits(models, config)
    unrolled = {name: unroll(model) for name, model in models.items()}

    def classify(batch: ModelBatch) -> tuple[ModelBatch, Tensor]:
        logits = exit_logits(unrolled[batch.model], exits[batch.model], batch.images)
        return batch, _per_image(logits, batch)

    per_image = {name: PerImage() for name in models}
    timed: dict[str, list[Tensor]] = {name: [] for name in models}
    for name, (batch, numbers) in stream(
        models, data, config, classify, progress="early-exit", labels=True
    ):
        per_image[name].update(batch.index, numbers)
        missing = config.n_timed - sum(map(len, timed[name]))
        if missing > 0:
            timed[name].append(batch.images[:missing].cpu())
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        times = _measure_times(unrolled[name], exits[name], timed[name], config)
        runs = _Runs.of(model, exits[name], per_image[name].compute()[1], times)
        rows += [{"model": name, **row} for row in _rows(runs, config, data.classes)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The table without the curve over all thresholds."""
    return frame[frame["table"] != "curve"]


def _load_exits(models: Mapping[str, Model], config: Config) -> dict[str, Exits]:
    if len(config.exits) != len(models):
        raise UserError(
            f"{len(models)} checkpoints need as many folders of exits, got {len(config.exits)}"
        )
    exits = {}
    for (name, model), folder in zip(models.items(), config.exits, strict=True):
        if isinstance(model, CalledSteps):
            raise UserError(
                f"{name} is no BViT and no stacked timm VisionTransformer: exits are trained for"
                " those alone"
            )
        exits[name] = Exits.load(folder / FILE, model)
        check_exits(exits[name].steps, model)
    return exits


def _per_image(logits: Tensor, batch: ModelBatch) -> Tensor:
    """Label in the data's classes, then the confidence after each exit and the head, then whether
    the prediction is correct, ``(B, 1 + 2 (E + 1))``, from logits ``(B, E + 1, C)``."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = predicted == batch.labels[:, None]
    return torch.cat([batch.data_labels[:, None], confidence, correct], 1).cpu()


def _measure_times(
    unrolled: VisionTransformer, exits: Exits, timed: Sequence[Tensor], config: Config
) -> dict[tuple[str, float], dict[str, float]]:
    """(table, threshold) -> its columns of time, where the time is measured."""
    if not timed:
        return {}
    images = torch.cat(list(timed))
    size = min(config.timed_batch, len(images))
    keys = [("threshold", tau) for tau in config.thresholds]
    if config.timed_curve:
        keys += [("curve", tau) for tau in CURVE]
    plain, *runs = exit_times(unrolled, exits, images, [tau for _, tau in keys], size)
    return {
        key: {
            "latency_ms": 1000 * float(np.median(seconds)) / size,
            "saved_time": 1 - float(np.median(seconds / plain)),
        }
        for key, seconds in zip(keys, runs, strict=True)
    }


@dataclass(frozen=True)
class _Runs:
    """The numbers of every image of a model, and what leaving after each exit costs.

    Parameters
    ----------
    labels : ``(n,)``, in the data's classes.
    confidence, correct : ``(n, E + 1)``, after each exit and after the model's own head.
    steps : ``(E + 1,)``, the step that each of them reads.
    gflops, gflops_attention : of `_gflops`, without and with attention.
    times : of `_measure_times`.
    """

    labels: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    steps: np.ndarray
    gflops: np.ndarray
    gflops_attention: np.ndarray
    times: Mapping[tuple[str, float], Mapping[str, float]]

    @classmethod
    def of(
        cls,
        model: Model,
        exits: Exits,
        per_image: Tensor,
        times: Mapping[tuple[str, float], Mapping[str, float]],
    ) -> _Runs:
        """From the rows of `_per_image` of all images."""
        confidence, correct = np.split(per_image[:, 1:].numpy(), 2, axis=1)
        return cls(
            labels=per_image[:, 0].numpy().astype(int),
            confidence=confidence,
            correct=correct,
            steps=np.array([*exits.steps, len(model.blocks)]),
            gflops=_gflops(model, exits, False),
            gflops_attention=_gflops(model, exits, True),
            times=times,
        )

    def of_class(self, label: int) -> _Runs:
        """The runs of the images of one class."""
        members = self.labels == label
        return _Runs(
            labels=self.labels[members],
            confidence=self.confidence[members],
            correct=self.correct[members],
            steps=self.steps,
            gflops=self.gflops,
            gflops_attention=self.gflops_attention,
            times=self.times,
        )

    def columns(self, positions: np.ndarray) -> dict[str, Any]:
        """The columns of a row whose images leave at these exits ``(n,)``, from 0."""
        n = len(positions)
        hits = self.correct[np.arange(n), positions].sum()
        low, high = wilson_interval(hits, n)
        with_attention = float(self.gflops_attention[positions].mean())
        return {
            "accuracy": hits / n,
            "low": low,
            "high": high,
            "n": n,
            "accuracy_null": random_exit_accuracy(self.correct, positions),
            "mean_step": float(self.steps[positions].mean()),
            "gflops": float(self.gflops[positions].mean()),
            "gflops_attention": with_attention,
            "saved_flops": 1 - with_attention / self.gflops_attention[-1],
        }


def _rows(runs: _Runs, config: Config, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one model: thresholds, curve, exits and classes of the data."""
    middle = sorted(config.thresholds)[len(config.thresholds) // 2]
    rows = [_threshold_row(runs, "threshold", tau) for tau in config.thresholds]
    rows += [_threshold_row(runs, "curve", tau) for tau in CURVE]
    rows += [_exit_row(runs, e, middle) for e in range(len(runs.steps))]
    for label in np.unique(runs.labels).tolist():
        members = runs.of_class(label)
        row = members.columns(exit_positions(members.confidence, middle))
        rows.append({"table": "class", "threshold": middle, "class": class_names[label]} | row)
    return rows


def _threshold_row(runs: _Runs, table: str, threshold: float) -> dict[str, Any]:
    row = runs.columns(exit_positions(runs.confidence, threshold))
    return (
        {"table": table, "threshold": threshold}
        | row
        | dict(runs.times.get((table, threshold), {}))
    )


def _exit_row(runs: _Runs, e: int, middle: float) -> dict[str, Any]:
    """The classifier of exit e, from 0, alone on all images."""
    confidence, correct = runs.confidence[:, e], runs.correct[:, e]
    return {
        "table": "exit",
        "exit": int(runs.steps[e]),
        "share": float((exit_positions(runs.confidence, middle) == e).mean()),
        "auroc": _auroc(confidence, correct),
        "calibration_error": _calibration_error(confidence, correct),
        **runs.columns(np.full(len(correct), e)),
    }


def _auroc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Exact; ties count half; nan where all predictions are correct, or all are wrong."""
    if not 0 < correct.sum() < len(correct):
        return math.nan
    return float(roc_auc_score(correct, confidence))


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    predicted, target = torch.tensor(confidence.tolist()), torch.tensor(correct.tolist()).long()
    return float(binary_calibration_error(predicted, target, n_bins=_BINS))


def _gflops(model: Model, exits: Exits, count_attention: bool) -> np.ndarray:
    """Cost of an image that leaves at each exit, with its steps and all classifiers read so far,
    and last of a plain forward without exits, ``(E + 2,)``."""
    classifier = 2 * model.embed_dim * model.num_classes
    costs = [
        flops(model, count_attention=count_attention, steps=step) + e * classifier
        for e, step in enumerate((*exits.steps, len(model.blocks)))
    ]
    return np.array([*costs, flops(model, count_attention=count_attention)]) / 1e9
