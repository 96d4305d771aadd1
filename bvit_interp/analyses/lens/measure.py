"""Scores of logit lens and tuned lens on every token and step.

Ours; not in bViT (arXiv 2605.10661), whose Fig. 8 is the raw lens on CLS. The raw lens is the logit
lens (nostalgebraist, 2020): the model's own final norm and head on z_t, of CLS, registers and
patches alike. The tuned lens (Belrose et al., 2023, arXiv 2303.08112) is the same on ``z_t W_t +
c_t``, with one affine map for each step and group of tokens, trained on cached states of images
that are not scored to minimise ``KL(final prediction || lens)``. Unlike theirs the training starts
at the least squared error to z_T^cls, and each step is over the whole set, so that it is the same
on any number of processes (`tuned_lens.py`). It uses CLS and up to four tokens of each other group
per image; registers and patches are trained to give the prediction of the image too.

Tokens are read one by one where timm's norm and head make the answer of CLS alone. Any other model
(with a mean over patches, or a coda behind its loop) has the raw lens of its `answer`: what its own
forward makes of z_t in place of z_T.

A row is one value of one `metric` after one step; the number of an image is the mean over its
tokens of the group:

- `accuracy`; `agreement` with the model's final prediction and the `kl` from it, nats; `flips` from
  the previous step; `entropy`, nats; `true_rank`; `confidence` and the `calibration_error` of Guo
  et al. (2017), 15 bins over all tokens;
- `exit_accuracy` if an image leaves after the first step whose largest softmax probability on CLS
  (or of the answer) exceeds tau, and after T by the model's own head; `mean_step` at which images
  leave;
- a map for each image, of every patch's log probability of the true class: `map_entropy` of the
  probabilities as shares of the patches, `map_correlation` with the map of step T, and with masks
  `pointing`: whether its maximum is on the object.

The null of each metric: for `accuracy`, the share of the most frequent class; for `agreement` and
`kl`, the final prediction of another image, over all pairs; for `flips`, independent predictions
with the same class frequencies; for `entropy`, log C; for `true_rank`, logits in random order; for
`confidence`, none; for `calibration_error`, the error that sampling alone gives calibrated
predictions (tokens as if independent); for `exit_accuracy`, as many images leaving at each step,
drawn at random; for `map_entropy`, the other classes; for `map_correlation`, the map of another
image; for `pointing`, the mask of another image, over all pairs. A point chosen at random hits with
`object_share`, the share of patches whose centre is on the object. The lens `shuffled` is a null of
the tuned lens: trained in the same way, on states and logits of different images.

Cost: one forward of every image, and the training; 1000 images of 32 px scored and 2000 cached, for
a bViT of width 128 and its ViT, take 90 s of one core. ImageNet on a GPU, computed and not
measured: 44 GFLOPs per image for bViT-B, a third more than the forward alone, 3 x 10^13 FLOPs for
the training, and 370 MB of cached states for 1000 images. Expected: raw predictions are near chance
at the first steps; the tuned lens reads more there and equals the raw one at T.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.lens import COLUMNS, Config
from bvit_interp.analyses.lens.map_scores import MapScores
from bvit_interp.analyses.lens.prediction_scores import PredictionScores
from bvit_interp.analyses.lens.tuned_lens import (
    ANSWER,
    LENSES,
    Lenses,
    answer_lens,
    cached_states,
    fit_lenses,
    head_of,
    lens_logits,
    token_groups,
)
from bvit_interp.data.labels import label_map
from bvit_interp.data.samples import Samples, Subset, evenly_spaced
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import at_patch_centres, wilson_interval
from bvit_interp.metrics.exits import exit_positions, random_exit_accuracy
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model, unroll
from bvit_interp.results import file_stem, write_arrays
from bvit_interp.vocabulary import IGNORE

_WHOLE = ("cls", ANSWER)  # one read per image
_SHARES = ("accuracy", "agreement", "flips")  # there each image counts as 0 or 1
_TRAINED_TOKENS = 4  # the most of an image and group that a map is trained on
_THRESHOLDS = tuple(i / 50 for i in range(51))
_BYTES_OF_LOGITS = 2**27  # of the patches' logits of one batch, the most


@for_any_model
def measure(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Scores of every lens on every model.

    Parameters
    ----------
    models : name -> model; all models see each image in one pass, and the images of the fit in
        another.
    data : labelled images; masks are used if there are any.
    folder : where the maps are written; without it none are kept.

    Returns
    -------
    A table of `COLUMNS`.
    """
    for model in models.values():
        # classes that do not match are refused before the training
        label_map(data, model, config.classes)
    unrolled = {name: unroll(model) for name, model in models.items()}
    fitted, scored = _split(data, config)
    lenses, n_fit = _fit(unrolled, fitted, config)
    examples: list[int] = []
    if folder is not None and config.n_examples:
        examples = evenly_spaced(len(scored), config.n_examples)
    scores = {
        name: _ModelScores(view, lenses[name], data.has_masks, examples)
        for name, view in unrolled.items()
    }

    def read(batch: ModelBatch) -> tuple[ModelBatch, dict[tuple[str, str], Tensor]]:
        return batch, lens_logits(unrolled[batch.model], batch.images, lenses[batch.model])

    for name, (batch, logits) in stream(
        unrolled,
        scored,
        replace(config, limit=None),
        read,
        progress="lens",
        labels=True,
        images_at_once={name: _images_at_once(view) for name, view in unrolled.items()},
    ):
        scores[name].update(batch, logits)
    rows: list[dict[str, Any]] = []
    for name, of_model in scores.items():
        path = None
        if folder is not None and of_model.has_maps:
            path = folder / f"lens_{file_stem(name)}.npz"
            of_model.write_maps(path, data.classes)
        shared = {"model": name, "n_fit": n_fit[name], "path": None if path is None else str(path)}
        rows += [shared | row for row in of_model.rows()]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS)).astype({"step": "Int64"})


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and divergence on CLS, or of the answer, after a quarter, half and all steps."""
    last = frame.groupby("model")["step"].transform("max")
    shown = (frame["step"] == last) | (frame["step"] == last // 2) | (frame["step"] == last // 4)
    metrics = frame["metric"].isin(("accuracy", "kl"))
    rows = frame[shown & frame["tokens"].isin(_WHOLE) & metrics]
    return rows.drop(columns=["threshold", "mean_step", "path"])


# ---- training the maps ---------------------------------------------------------------------------


def _split(data: Samples, config: Config) -> tuple[Subset, Subset]:
    """Images to train the maps on, and others to score."""
    chosen = evenly_spaced(len(data), config.limit)
    others = sorted(set(range(len(data))) - set(chosen))
    if len(others) >= config.n_fit:
        fitted = [others[i] for i in evenly_spaced(len(others), config.n_fit)]
        return Subset(data, fitted), Subset(data, chosen)
    if len(chosen) < 4:
        raise UserError(
            "the lens is tuned on images that are not scored:"
            f" at least 4 are needed, got {len(chosen)}"
        )
    held_out = set(evenly_spaced(len(chosen), min(config.n_fit, len(chosen) // 2)))
    fitted = [image for i, image in enumerate(chosen) if i in held_out]
    scored = [image for i, image in enumerate(chosen) if i not in held_out]
    return Subset(data, fitted), Subset(data, scored)


def _fit(
    unrolled: Mapping[str, Model], fitted: Subset, config: Config
) -> tuple[dict[str, Lenses], dict[str, int]]:
    """The lenses of every model, and the number of images they are trained on.

    States are cached in one pass and gathered in the order of the data set, so every process trains
    the same maps.
    """
    lenses = {name: answer_lens(view) for name, view in unrolled.items() if head_of(view) is None}
    tuned = {name: view for name, view in unrolled.items() if name not in lenses}
    n_fit = dict.fromkeys(lenses, 0)
    if not tuned:
        return lenses, n_fit
    cached = {
        name: {key: PerImage() for key in (*token_groups(view), "logits")}
        for name, view in tuned.items()
    }

    def record(batch: ModelBatch) -> tuple[Tensor, dict[str, Tensor]]:
        recorded = cached_states(unrolled[batch.model], batch.images, batch.index, _TRAINED_TOKENS)
        return batch.index, {key: values.flatten(1).cpu() for key, values in recorded.items()}

    for name, (index, recorded) in stream(
        tuned, fitted, replace(config, limit=None), record, progress="lens, tuning"
    ):
        for key, values in recorded.items():
            cached[name][key].update(index, values)
    for name, view in tuned.items():
        rows = {key: metric.compute()[1].float() for key, metric in cached.pop(name).items()}
        lenses[name] = fit_lenses(view, rows, config.iterations, config.seed)
        n_fit[name] = len(rows["logits"])
    return lenses, n_fit


# ---- scoring -------------------------------------------------------------------------------------


def _images_at_once(view: Model) -> int:
    """How many images' logits of all patches, steps and lenses fit in `_BYTES_OF_LOGITS`."""
    patches = layout_of(view).num_patches
    logits = len(view.blocks) * patches * view.num_classes * len(LENSES)
    return _BYTES_OF_LOGITS // (8 * logits)


class _ModelScores:
    """All that is kept of one model while the images are read.

    Parameters
    ----------
    view : a tied unroll or a stacked ViT.
    lenses : its lenses.
    masks : whether the images have masks.
    examples : positions of the images whose maps are kept.
    """

    def __init__(self, view: Model, lenses: Lenses, masks: bool, examples: Collection[int]) -> None:
        self._steps = len(view.blocks)
        layout = layout_of(view)
        self._grid, self._size = layout.grid, layout.image_size
        device = device_of(view)
        self._predictions = {
            key: PredictionScores(self._steps, view.num_classes, device) for key in lenses
        }
        self._maps = {
            lens: MapScores(self._steps, layout.num_patches, masks, device)
            for lens, group in lenses
            if group == "patches"
        }
        self._answers = [key for key in lenses if key[0] in LENSES and key[1] in _WHOLE]
        self._exits = PerImage()
        self._examples = PerImage()
        self._kept = torch.tensor(sorted(examples), dtype=torch.int64)

    @property
    def has_maps(self) -> bool:
        """Whether patches are read one by one."""
        return bool(self._maps)

    def update(self, batch: ModelBatch, logits: Mapping[tuple[str, str], Tensor]) -> None:
        """Add a batch with the logits of every lens."""
        final = logits[self._answers[0]][-1, :, 0]
        for key, scores in self._predictions.items():
            scores.update(logits[key], final, batch.labels)
        masks = _patch_masks(batch, self._grid)
        maps = [
            scores.update(logits[lens, "patches"], batch.labels, masks)
            for lens, scores in self._maps.items()
        ]
        exits = [_exit_numbers(logits[key], final, batch.labels) for key in self._answers]
        self._exits.update(batch.index, torch.cat(exits, 1).cpu())
        if not self.has_maps:
            return
        kept = torch.isin(batch.index, self._kept)
        examples = batch.take(kept)
        parts = [
            examples.data_labels[:, None],
            batch.geometry.to_pixels(examples.images),
            torch.stack(maps, 1)[kept.to(batch.device)],
        ]
        numbers = torch.cat([part.double().flatten(1) for part in parts], 1)
        self._examples.update(examples.index, numbers.cpu())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the model, without the columns that are equal in all of them."""
        scores = {key: metric.compute() for key, metric in self._predictions.items()}
        for lens, maps in self._maps.items():
            scores[lens, "patches"] |= maps.compute()
        n = int(scores[self._answers[0]]["accuracy"]["n"][0])
        for (lens, group), metrics in scores.items():
            for metric, columns in metrics.items():
                key = {"lens": lens, "tokens": group, "metric": metric}
                for i in range(self._steps):
                    row = {column: values[i].item() for column, values in columns.items()}
                    counted = group in _WHOLE and metric in _SHARES
                    if counted and not math.isnan(row["value"]):
                        row["low"], row["high"] = wilson_interval(row["value"] * n, n)
                    yield key | {"step": i + 1, "n": n} | row
        yield from self._exit_rows()

    def _exit_rows(self) -> Iterator[dict[str, Any]]:
        table = self._exits.compute()[1].numpy()
        n = len(table)
        numbers = table.reshape(n, len(self._answers), 2, self._steps)
        for i, (lens, group) in enumerate(self._answers):
            confidence, correct = numbers[:, i, 0], numbers[:, i, 1]
            for tau in _THRESHOLDS:
                positions = exit_positions(confidence, tau)
                hits = correct[np.arange(n), positions].sum()
                low, high = wilson_interval(hits, n)
                yield {
                    "lens": lens,
                    "tokens": group,
                    "metric": "exit_accuracy",
                    "threshold": tau,
                    "n": n,
                    "value": hits / n,
                    "low": low,
                    "high": high,
                    "null": random_exit_accuracy(correct, positions),
                    "mean_step": float(positions.mean() + 1),
                }

    def write_maps(self, path: Path, classes: Sequence[str]) -> None:
        """Write the mean maps and the examples."""
        pixels = 3 * self._size[0] * self._size[1]
        labels, images, maps = np.split(
            self._examples.compute()[1].numpy(), [1, 1 + pixels], axis=1
        )
        means = np.stack([scores.mean_maps().numpy() for scores in self._maps.values()])
        shape = (len(LENSES), self._steps, *self._grid)
        write_arrays(
            path,
            lenses=np.array(LENSES),
            classes=np.array([classes[int(label)] for label in labels.flat]),
            images=images.reshape(len(labels), *self._size, 3).astype(np.uint8),
            maps=maps.reshape(len(labels), *shape).astype(np.float32),
            mean_maps=means.reshape(shape),
        )


def _patch_masks(batch: ModelBatch, grid: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Patches whose centre is on the object, and those whose centre is ignored, ``(B, P)`` bool."""
    if batch.masks is None:
        return None
    centres = at_patch_centres(batch.masks, grid)
    return centres == batch.data_labels[:, None] + 1, centres == IGNORE


def _exit_numbers(logits: Tensor, final: Tensor, labels: Tensor) -> Tensor:
    """Confidence after every step, then whether the prediction is correct, ``(B, 2 T)``;
    after T those of the model itself."""
    per_step = torch.cat([logits[:-1, :, 0], final[None]]).double()
    confidence, correct = per_step.softmax(-1).amax(-1), per_step.argmax(-1) == labels
    return torch.cat([confidence.T, correct.double().T], 1)
