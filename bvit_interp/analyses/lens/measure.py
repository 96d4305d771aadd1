"""What does the head already read in every token at every step, raw and behind an affine map tuned
for the step?

Ours; not in bViT (arXiv 2605.10661), whose Fig. 8 is the raw lens on CLS. Raw is the logit lens
(nostalgebraist, 2020): the model's own final norm and head on z_t, of CLS, registers and patches
alike. Tuned is the tuned lens (Belrose et al., 2023, arXiv 2303.08112): the same on ``z_t W_t +
c_t``, one affine map for each step and kind of token, trained on cached states of images that are
not scored for the least ``KL(final answer || lens)``. Unlike theirs the training starts at the
least squared error to z_T^cls and each step is over the whole set, so that it is the same on any
number of processes (`probes/lenses.py`). Of an image it sees CLS and up to four tokens of each
other kind; registers and patches are to give the image's answer too.

A row is one value of one `statistic` after one step, an image's number being the mean over its
tokens of the kind:

- `top1`; `agreement` with the model's final answer and the `kl` from it, nats; `flips` from the
  step before; `entropy`, nats; `true_rank`; `confidence` and the `calibration_error` of Guo et al.
  (2017), 15 bins over all tokens;
- `exit_accuracy` where an image leaves after the first step whose largest softmax probability on
  CLS exceeds tau, and after T by the model's own head; `mean_step` at which they leave;
- of every patch's log probability of the true class, a map for each image: `map_entropy` of the
  probabilities as shares of the patches, `map_correlation` with the map of step T, and with masks
  `pointing`: is its maximum on the object?

`null`, in this order: the most frequent class; the final answer of another image, over all pairs,
twice; independent answers given as often; log C; logits in random order; none; what sampling alone
makes of calibrated answers (tokens as if independent); as many images leaving at each step, drawn
at random; the classes that are not true; another image's map; another image's mask, over all pairs.
A point that does not look hits with `object_share`, the share of patches whose centre is on the
object. The lens `shuffled` is a null of the tuned one: trained alike, on states and answers of
different images.

Cost: one forward of every image, and the training; 1000 images of 32 px scored and 2000 cached, for
a bViT of width 128 and its ViT, take 90 s of one core. ImageNet on a GPU, computed and not
measured: 44 GFLOPs an image for bViT-B, a third more than the forward alone, 3 x 10^13 FLOPs for
the training, and 370 MB of cached states for 1000 images. Expected: raw answers are near chance at
the first steps; the tuned lens reads more there and meets the raw one at T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from timm.models.vision_transformer import VisionTransformer

from bvit_interp.analyses.lens import COLUMNS, Config
from bvit_interp.analyses.lens.scores import LENSES, Readings, leave
from bvit_interp.analyses.lens.tuned_lens import Lenses, cached_states, kinds, make_lenses
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples, Subset, spread
from bvit_interp.errors import UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.unroll import unroll
from bvit_interp.results import rank_and_world, replacing

_SHARES = ("top1", "agreement", "flips")  # on CLS each image is right or not


_TOKENS = 4  # of an image and kind, at most, that a map is trained on


_THRESHOLDS = tuple(i / 50 for i in range(51))


def measure(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    folder: Path | None = None,
) -> pd.DataFrame:
    """What every lens reads in every model.

    Parameters
    ----------
    models : name -> model whose head reads CLS; all see each image in one pass, and the images of
        the fit in another.
    data : labelled images; masks are used where there are any.
    folder : where the maps go; without it none are kept.

    Returns
    -------
    A table of `COLUMNS`.
    """
    classes = {name: label_map(data, model) for name, model in models.items()}
    fitted, scored = _split(data, config)
    lenses, trained_on = _tune(models, fitted, config)
    examples = (
        spread(len(scored), config.examples) if folder is not None and config.examples else []
    )
    readings = {
        name: Readings(view, of_model, data.has_masks, examples)
        for name, (view, of_model) in lenses.items()
    }
    loader, geometries = replace(config, limit=None).loader(scored, models, "lens")
    for batch in loader:
        for name, of_model in readings.items():
            of_model.update(batch, geometries[name], classes[name])
    rows: list[dict[str, Any]] = []
    for name, of_model in readings.items():
        path = (
            None
            if folder is None
            else folder / f"lens_{name.replace('/', '_').replace('@', '_')}.npz"
        )
        if path is not None:
            _keep(of_model, path, data.classes)
        shared = {
            "model": name,
            "fit_images": trained_on,
            "path": None if path is None else str(path),
        }
        rows += [shared | row for row in _rows(of_model)]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS)).astype({"step": "Int64"})


def _split(data: Samples, config: Config) -> tuple[Subset, Subset]:
    """Images to train the maps on, and others to score."""
    chosen = spread(len(data), config.limit)
    pool = sorted(set(range(len(data))) - set(chosen))
    if len(pool) >= config.fit_images:
        return Subset(data, [pool[i] for i in spread(len(pool), config.fit_images)]), Subset(
            data, chosen
        )
    if len(chosen) < 4:
        raise UserError(
            f"the lens is tuned on images that are not scored: at least 4 are needed, got {len(chosen)}"
        )
    held = set(spread(len(chosen), min(config.fit_images, len(chosen) // 2)))
    fitted, scored = (
        [place for i, place in enumerate(chosen) if (i in held) == which] for which in (True, False)
    )
    return Subset(data, fitted), Subset(data, scored)


def _tune(
    models: Mapping[str, VisionTransformer], fitted: Subset, config: Config
) -> tuple[dict[str, tuple[VisionTransformer, Lenses]], int]:
    """Every model unrolled with its lenses, and the images they are trained on: states cached in
    one pass, then a map for each step and kind of token.

    States are gathered in the order of the data set, so every process trains the same maps."""
    views = {name: unroll(model) for name, model in models.items()}
    cached = {
        name: {kind: PerImage() for kind in (*kinds(view), "answers")}
        for name, view in views.items()
    }
    loader, geometries = replace(config, limit=None).loader(fitted, models, "lens, tuning")
    for batch in loader:
        for name, view in views.items():
            for index, found in run_in_halves(
                lambda part, name=name, view=view: (
                    part.index,
                    cached_states(view, part.views[geometries[name]][0], part.index, _TOKENS),
                ),
                batch,
            ):
                for kind, states in found.items():
                    cached[name][kind].update(index, states.flatten(1).cpu())
    made, count = {}, 0
    for name, view in views.items():
        rows = {kind: of_kind.compute()[1].float() for kind, of_kind in cached.pop(name).items()}
        made[name] = view, make_lenses(view, rows, config.iterations, config.seed)
        count = len(rows["answers"])
    return made, count


def _rows(readings: Readings) -> Iterator[dict[str, Any]]:
    """Rows of one model, but for what they share."""
    found = {key: scores.compute() for key, scores in readings.scores.items()}
    for lens, maps in readings.maps.items():
        found[lens, "patches"] |= maps.compute()
    n = int(found["raw", "cls"]["top1"]["n"][0])
    for (lens, kind), statistics in found.items():
        for statistic, measures in statistics.items():
            for t in range(readings.steps):
                of_step = {key: values[t].item() for key, values in measures.items()}
                if kind == "cls" and statistic in _SHARES and not math.isnan(of_step["value"]):
                    of_step["low"], of_step["high"] = wilson_interval(of_step["value"] * n, n)
                yield {
                    "lens": lens,
                    "tokens": kind,
                    "statistic": statistic,
                    "step": t + 1,
                    "n": n,
                } | of_step
    leaving = readings.leaving.compute()[1].numpy().reshape(n, len(LENSES), 2, readings.steps)
    for i, lens in enumerate(LENSES):
        for tau in _THRESHOLDS:
            row = {
                "lens": lens,
                "tokens": "cls",
                "statistic": "exit_accuracy",
                "threshold": tau,
                "n": n,
            }
            yield row | leave(leaving[:, i, 0], leaving[:, i, 1], tau)


def _keep(readings: Readings, path: Path, classes: Sequence[str]) -> None:
    """Write the mean maps and the examples."""
    lenses, size = list(readings.maps), readings.view.patch_embed.img_size
    means = np.stack([maps.mean.compute()["value"] for maps in readings.maps.values()])
    labels, pixels, maps = np.split(
        readings.examples.compute()[1].numpy(), [1, 1 + 3 * size[0] * size[1]], axis=1
    )
    if rank_and_world()[0] == 0:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                lenses=np.array(lenses),
                classes=np.array([classes[int(label)] for label in labels[:, :1].flat]),
                images=pixels.reshape(len(labels), *size, 3).astype(np.uint8),
                maps=maps.reshape(len(labels), len(lenses), readings.steps, *readings.grid).astype(
                    np.float32
                ),
                mean_maps=means.reshape(len(lenses), readings.steps, *readings.grid),
            )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and divergence on CLS after a quarter, half and all of the steps."""
    last = frame.groupby("model")["step"].transform("max")
    shown = (frame["step"] == last) | (frame["step"] == last // 2) | (frame["step"] == last // 4)
    rows = frame[shown & (frame["tokens"] == "cls") & frame["statistic"].isin(("top1", "kl"))]
    return rows.drop(columns=["threshold", "mean_step", "path"])
