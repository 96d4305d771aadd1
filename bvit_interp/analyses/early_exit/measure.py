"""How much is saved when an image leaves as soon as a classifier is sure, and what does it cost in
accuracy?

Table 5 and Appendix B of bViT (arXiv 2605.10661): classifiers read CLS after chosen steps of the
frozen model (`bvit-interp early-exit train`); an image leaves at the first whose confidence ``max
softmax`` exceeds the threshold tau, else the model's own head answers after step T. FLOPs are those
of the steps run and the classifiers read, in both conventions. Time is measured: the same images
through a run that drops those that left, and through a plain forward, in turns. The null of an
accuracy is `accuracy_null`: as many images leave at each exit, but drawn at random, not by
confidence. The null of `auroc` is 0.5. Thresholds and exits of the paper are not printed: ours are
options.

Cost: one forward an image, and for the times up to one of `timed_images` a threshold; 10,000 images
of 32 px at width 128 take 2 min on one core, times included. Expected: in the paper bViT-B keeps
0.776 of 0.779 at 27.3 of 33.7 GFLOPs, 19 % less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from bvit_interp.analyses.early_exit import COLUMNS, Config
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.cost import flops
from bvit_interp.models.exits import FILE, Exits, check_exits, run_with_exits
from bvit_interp.models.stepping import advance, answer, embed
from bvit_interp.models.unroll import unroll

CURVE = tuple(i / 50 for i in range(51))


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Accuracy, FLOPs and time of every threshold, and the quality of every exit.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, not those the exits were trained on.

    Returns
    -------
    A table of `COLUMNS`.
    """
    if len(config.exits) != len(models):
        raise UserError(
            f"{len(models)} checkpoints need as many folders of exits, got {len(config.exits)}"
        )
    found = {}
    for (name, model), folder in zip(models.items(), config.exits, strict=True):
        found[name] = Exits.load(folder / FILE, model)
        check_exits(found[name].steps, model)
    views = {name: unroll(model) for name, model in models.items()}
    classes = {name: label_map(data, model) for name, model in models.items()}
    rows, timed = {name: PerImage() for name in models}, list["Batch"]()
    loader, geometries = config.loader(data, models, "early-exit")
    for batch in loader:
        if sum(map(len, timed)) < config.timed_images:
            timed.append(batch)
        for name in models:
            parts = run_in_halves(
                lambda part, name=name: (
                    part.index,
                    _scores(
                        views[name],
                        found[name],
                        part.views[geometries[name]][0],
                        classes[name][part.labels],
                    ),
                ),
                batch,
            )
            for index, row in parts:
                rows[name].update(index, row)
    table = []
    for name, model in models.items():
        images = _pixels(timed, geometries[name], config.timed_images)
        table += _of_model(
            name, model, found[name], rows[name].compute()[1], list(data.classes), config
        )
        if len(images):
            _time(table, name, views[name], found[name], images, config)
    return pd.DataFrame(table, columns=list(COLUMNS))


def _scores(view: VisionTransformer, exits: Exits, images: Tensor, labels: Tensor) -> Tensor:
    """Rows ``(B, 1 + 3 (E + 1))``: label, then confidence, answer and its rightness after each exit
    and after T."""
    with torch.inference_mode():
        state, logits = embed(view, images.to(next(view.parameters()).device)), []
        for t in range(1, len(view.blocks) + 1):
            state = advance(view, state)
            if t in exits.steps:
                logits.append(exits.one(exits.steps.index(t), state.tokens[:, 0]))
        p = torch.stack([*logits, answer(view, state)], 1).double().softmax(-1).cpu()
    confidence, said = p.max(-1)
    right = said == labels[:, None]
    return torch.cat([labels[:, None], confidence, said, right], 1)


def _of_model(
    name: str,
    model: VisionTransformer,
    exits: Exits,
    rows: Tensor,
    classes: list[str],
    config: Config,
) -> list[dict[str, Any]]:

    steps = np.array([*exits.steps, len(model.blocks)])
    labels, (confidence, _, right) = rows[:, 0].numpy(), np.split(rows[:, 1:].numpy(), 3, axis=1)
    costs = [_gflops(model, exits, attention) for attention in (False, True)]
    made = []
    for kind, threshold in [("threshold", tau) for tau in config.thresholds] + [
        ("curve", tau) for tau in CURVE
    ]:
        made.append(
            _row(name, kind, _leave(confidence, threshold), right, steps, costs)
            | {"threshold": threshold}
        )
    middle = sorted(config.thresholds)[len(config.thresholds) // 2]
    gone = _leave(confidence, middle)
    for e, step in enumerate(steps):
        alone = _row(name, "exit", np.full(len(rows), e), right, steps, costs)
        made.append(
            alone
            | {
                "exit": int(step),
                "share": float((gone == e).mean()),
                "auroc": _auroc(confidence[:, e], right[:, e]),
                "calibration_error": _calibration_error(confidence[:, e], right[:, e]),
            }
        )
    for label in np.unique(labels).astype(int):
        own = labels == label
        row = _row(name, "class", gone[own], right[own], steps, costs)
        of_data = classes[label] if len(classes) == model.num_classes else str(label)
        made.append(row | {"threshold": middle, "class": of_data})
    return made


def _leave(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Which exit (from 0; the last is the model's head) each image leaves at, of confidences ``(n,
    E + 1)``."""
    sure = confidence > threshold
    sure[:, -1] = True
    return sure.argmax(1)


def _auroc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Exact, ties count half; nan where all answers are right, or all wrong."""
    return float(roc_auc_score(right, confidence)) if 0 < right.sum() < len(right) else math.nan


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    parts = (torch.tensor(confidence.tolist()), torch.tensor(right.tolist()).long())
    return float(binary_calibration_error(*parts, n_bins=15))


def _gflops(model: VisionTransformer, exits: Exits, attention: bool) -> np.ndarray:
    """Cost of an image that leaves at each exit, its steps and all classifiers read on the way,
    then of a plain forward without any ``(E + 2,)``."""
    head, steps = 2 * model.embed_dim * model.num_classes, (*exits.steps, len(model.blocks))
    of = [flops(model, count_attention=attention, steps=t) + e * head for e, t in enumerate(steps)]
    return np.array([*of, flops(model, count_attention=attention)]) / 1e9


def _row(
    name: str,
    kind: str,
    gone: np.ndarray,
    right: np.ndarray,
    steps: np.ndarray,
    costs: list[np.ndarray],
) -> dict[str, Any]:

    hits, n = right[np.arange(len(gone)), gone].sum(), len(gone)
    low, high = wilson_interval(hits, n)
    shares = np.bincount(gone, minlength=len(steps)) / n
    return {
        "model": name,
        "kind": kind,
        "accuracy": hits / n,
        "low": low,
        "high": high,
        "n": n,
        "accuracy_null": float(shares @ right.mean(0)),
        "mean_step": float(steps[gone].mean()),
        "gflops": float(costs[0][gone].mean()),
        "gflops_attention": float(costs[1][gone].mean()),
        "saved_flops": 1 - float(costs[1][gone].mean() / costs[1][-1]),
    }


def _pixels(batches: list[Batch], geometry: Geometry, count: int) -> Tensor:
    """The images whose time is measured ``(n, 3, H, W)``."""
    views = [batch.views[geometry][0] for batch in batches]
    return torch.cat(views)[:count] if views else torch.empty(0)


def _time(
    table: list[dict[str, Any]],
    name: str,
    view: VisionTransformer,
    exits: Exits,
    images: Tensor,
    config: Config,
) -> None:
    """Fill in the measured times: every threshold and the plain forward in turn, batch by batch."""
    device = next(view.parameters()).device
    size = min(config.timed_batch, len(images))
    batches = [part.to(device) for part in images.split(size) if len(part) == size]
    kinds = ("threshold", "curve") if config.timed_curve else ("threshold",)
    rows = [row for row in table if row["model"] == name and row["kind"] in kinds]
    taken = np.empty((len(rows) + 1, len(batches)))
    with torch.inference_mode():
        view(batches[0])
        for j, part in enumerate(batches):
            for i, row in enumerate([None, *rows]):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                began = time.perf_counter()
                view(part) if row is None else run_with_exits(view, exits, part, row["threshold"])
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken[i, j] = time.perf_counter() - began
    for row, own in zip(rows, taken[1:], strict=True):
        row["ms"] = 1000 * float(np.median(own)) / size
        row["saved_time"] = 1 - float(np.median(own / taken[0]))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the curve over all thresholds."""
    return frame[frame["kind"] != "curve"]
