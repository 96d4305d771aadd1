"""What lenses read, scored: against labels, the final answer and masks, each with what chance would
give.

Sums in torchmetrics, on the model's device from the start: a process without images takes part in
the gather too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics import Metric

from bvit_interp.analyses.lens.tuned_lens import Lenses, look
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import Batch, run_in_halves
from bvit_interp.data.samples import IGNORE
from bvit_interp.metrics import at_patch_centres, entropy, point_hits, unit_maps, wilson_interval
from bvit_interp.metrics.streaming.predictions import StepPredictions
from bvit_interp.metrics.streaming.means import MapPairs, MeanCI
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.metrics.streaming.statistics import PerImage

LENSES = ("raw", "tuned")
BYTES_OF_LOGITS = 2**27


class CrossPairs(Metric):
    """Mean inner product of a vector of an image with one of the same image, and of another: all
    ordered pairs of different images, exactly and in constant memory, for the sum of all products
    is the product of the sums.

    Parameters
    ----------
    steps, width : T and K.

    Returns
    -------
    ``compute``: `same_image` and `other_images`, ``(T,)`` on the CPU; the second is nan below two
    images.
    """

    full_state_update = False
    n: Tensor
    one: Tensor
    other: Tensor
    same: Tensor

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        for name, shape in (
            ("n", ()),
            ("one", (width,)),
            ("other", (steps, width)),
            ("same", (steps,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, one: Tensor, other: Tensor) -> None:
        """Add a batch: ``(B, K)`` and ``(B, T, K)``."""
        one, other = one.double(), other.double()
        self.n += len(one)
        self.one += one.sum(0)
        self.other += other.sum(0)
        self.same += torch.einsum("bk,btk->t", one, other)

    def compute(self) -> dict[str, Tensor]:
        """Both means over all processes."""
        pairs = self.n * (self.n - 1)
        between = torch.where(pairs > 0, (self.other @ self.one - self.same) / pairs, torch.nan)
        return {"same_image": (self.same / self.n).cpu(), "other_images": between.cpu()}


Found = dict[str, dict[str, Tensor]]
"""Statistic -> value, null, and where it is a mean over images low and high: ``(T,)`` each."""


class LensScores:
    """What one lens on one kind of token answers after every step, against the labels and the
    model's final answer.

    An image's number is the mean over its tokens; intervals are over images. Everything is in
    torchmetrics, on `device` from the start: a process without images takes part in the gather too.
    """

    means = ("top1", "agreement", "kl", "flips")

    def __init__(self, steps: int, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.moments = MeanCI(len(self.means), steps).to(device)
        self.answers = StepPredictions(steps, classes).to(device)
        self.of_steps = [Classification(classes).to(device) for _ in range(steps)]
        self.likelihood, self.agreement = (CrossPairs(steps, classes).to(device) for _ in range(2))

    def update(self, logits: Tensor, final: Tensor, labels: Tensor) -> None:
        """Add a batch: the lens ``(T, B, N, C)``, the model's logits ``(B, C)``, labels
        ``(B,)``."""
        every = labels[:, None].expand(-1, logits.shape[2]).flatten()
        for metric, of_step in zip(self.of_steps, logits.flatten(1, 2), strict=True):
            metric.update(of_step, every)
        self.answers.update(logits.flatten(1, 2), every)
        log_q = logits.double().log_softmax(-1).mean(2).transpose(0, 1)
        log_p, said, wanted = final.double().log_softmax(-1), logits.argmax(-1), final.argmax(-1)
        divergence = (log_p.exp() * log_p).sum(-1)[:, None] - torch.einsum(
            "bc,btc->bt", log_p.exp(), log_q
        )
        first = log_p.new_full((1, len(labels)), torch.nan)
        flips = torch.cat([first, (said[1:] != said[:-1]).double().mean(-1)])
        right, agrees = ((said == c[:, None]).double().mean(-1).T for c in (labels, wanted))
        self.moments.update(torch.stack([right, agrees, divergence, flips.T], 1))
        self.likelihood.update(log_p.exp(), log_q)
        shares = F.one_hot(said, self.classes).double().mean(2).transpose(0, 1)
        self.agreement.update(F.one_hot(wanted, self.classes), shares)

    def compute(self) -> Found:
        """All statistics over all processes, on the CPU."""
        moments, along = (
            self.moments.compute(),
            {key: v.cpu() for key, v in self.answers.compute().items()},
        )
        scores = [metric.compute() for metric in self.of_steps]
        likelihood, agreement = self.likelihood.compute(), self.agreement.compute()
        found: Found = {
            name: {key: moments[key][i] for key in ("value", "low", "high", "n")}
            for i, name in enumerate(self.means)
        }
        of = {
            key: torch.tensor([s[key] for s in scores], dtype=torch.float64)
            for key in ("chance", "calibration_error", "confidence")
        }
        found["top1"]["null"] = of["chance"]
        found["agreement"]["null"] = agreement["other_images"]
        found["kl"]["null"] = (
            found["kl"]["value"] + likelihood["same_image"] - likelihood["other_images"]
        )
        found["flips"]["null"] = along["flips_null"]
        sampling = torch.tensor([_calibrated(s) for s in scores], dtype=torch.float64)
        found["calibration_error"] = {"value": of["calibration_error"], "null": sampling}
        found["confidence"] = {"value": of["confidence"]}
        found["entropy"] = {
            "value": along["entropy"],
            "null": torch.full_like(sampling, math.log(self.classes)),
        }
        found["true_rank"] = {
            "value": along["true_rank"],
            "null": torch.full_like(sampling, (self.classes + 1) / 2),
        }
        return _along_steps(found)


def _along_steps(found: Found) -> Found:
    """As they are, ``(T,)``: torchmetrics makes a scalar of the only number of a single step."""
    return {
        name: {key: values.reshape(-1) for key, values in parts.items()}
        for name, parts in found.items()
    }


def _calibrated(score: dict[str, Any]) -> float:
    """Calibration error expected of answers right as often as they are sure, from their number
    alone: in a bin of n answers of confidence c the normal mean absolute deviation sqrt(2 n c (1 -
    c) / pi)."""
    spreads = (
        n * c * (1 - c) for n, c in zip(score["bin_n"], score["bin_confidence"], strict=True) if n
    )
    return sum(math.sqrt(2 * max(spread, 0.0) / math.pi) for spread in spreads) / sum(
        score["bin_n"]
    )


class MapScores:
    """Maps of the true class's log probability over the patches after every step, under one lens.

    - `map_entropy` of the probabilities as shares of the patches; null the same for the classes
      that are not true;
    - `map_correlation` with the map of step T; null with that of another image;
    - with masks `pointing`, does the map's maximum lie on the object; null the mask of another
      image; and `object_share`, the share of patches that the object covers.
    """

    def __init__(self, steps: int, patches: int, masks: bool, device: torch.device) -> None:
        self.steps, self.mean = steps, MeanCI(steps, patches).to(device)
        self.entropies, self.likeness = MeanCI(2, steps).to(device), MeanCI(steps).to(device)
        self.pairs = MapPairs(steps, 1, patches).to(device)
        self.masks = masks
        self.pointing = MeanCI(2, steps).to(device)
        self.hits, self.counted = (CrossPairs(steps, patches).to(device) for _ in range(2))

    def update(
        self, logits: Tensor, labels: Tensor, masks: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Add a batch and return its maps ``(B, T, P)``, nats.

        Parameters
        ----------
        logits, labels : ``(T, B, P, C)`` and ``(B,)``.
        masks : bool ``(B, P)``, patches on the object, and patches that do not count; images
            without object are left out of the pointing.
        """
        log_q = logits.double().log_softmax(-1).permute(1, 0, 3, 2)
        own = labels[:, None, None, None].expand(-1, log_q.shape[1], 1, 1)
        maps = log_q.take_along_dim(own, 2)[:, :, 0]
        self.mean.update(maps)
        entropies = entropy(log_q.softmax(-1))
        true = entropies.take_along_dim(own[..., 0], 2)[..., 0]
        rest = (entropies.sum(-1) - true) / (entropies.shape[-1] - 1)
        self.entropies.update(torch.stack([true, rest], 1))
        units = unit_maps(maps)
        varied = units.any(-1) & units[:, -1:].any(-1)
        self.likeness.update(torch.where(varied, (units * units[:, -1:]).sum(-1), torch.nan))
        self.pairs.update(units[:, :, None])
        if masks is not None:
            self._point(maps, *masks)
        return maps

    def _point(self, maps: Tensor, positive: Tensor, ignored: Tensor) -> None:
        positive = positive & ~ignored
        shown = positive.any(-1)
        maps, positive, ignored = maps[shown], positive[shown], ignored[shown]
        share = (positive.sum(-1) / (~ignored).sum(-1)).double()
        hits = point_hits(maps, positive, ignored)
        self.pointing.update(torch.stack([hits, share[:, None].expand_as(hits)], 1))
        tied = (maps == maps.amax(-1, keepdim=True)).double()
        pointed = tied / tied.sum(-1, keepdim=True)
        self.hits.update(positive, pointed)
        self.counted.update(~ignored, pointed)

    def compute(self) -> Found:
        """All statistics over all processes, on the CPU."""
        entropies, pairs, likeness = (
            self.entropies.compute(),
            self.pairs.compute(),
            self.likeness.compute(),
        )
        found = {
            "map_entropy": {key: values[0] for key, values in entropies.items()}
            | {"null": entropies["value"][1]},
            "map_correlation": likeness
            | {"null": pairs["other_images"].reshape(self.steps, -1)[:, -1]},
        }
        if self.masks:
            pointing = self.pointing.compute()
            others = self.hits.compute()["other_images"] / self.counted.compute()["other_images"]
            found["pointing"] = {key: values[0] for key, values in pointing.items()} | {
                "null": others
            }
            found["object_share"] = {key: values[1] for key, values in pointing.items()}
        return _along_steps(found)


class Readings:
    """All that is kept of one model while the images go by.

    Parameters
    ----------
    view : a tied unroll or a stacked ViT.
    lenses : its lenses.
    masks : whether the images have masks.
    examples : places of the images whose maps are kept.

    Attributes
    ----------
    scores : (lens, kind of token) -> `LensScores`.
    maps : lens -> `MapScores`.
    leaving : of each image, of each of `LENSES` the confidence on CLS after every step and whether
        the answer is right, ``2 T`` numbers; after T of the model's own head.
    examples : of each example its label, its pixels ``(height, width, 3)`` and its maps ``(lenses,
        T, P)``, flat.
    """

    def __init__(
        self, view: VisionTransformer, lenses: Lenses, masks: bool, examples: Collection[int]
    ) -> None:
        self.view, self.lenses, self.steps = view, lenses, len(view.blocks)
        self.grid: tuple[int, int] = tuple(view.patch_embed.grid_size)
        device, patches = next(view.parameters()).device, view.patch_embed.num_patches
        self.scores = {key: LensScores(self.steps, view.num_classes, device) for key in lenses}
        self.maps = {lens: MapScores(self.steps, patches, masks, device) for lens in LENSES}
        self.leaving, self.examples, self.kept = PerImage(), PerImage(), frozenset(examples)
        self._bytes_an_image = 8 * self.steps * patches * view.num_classes * len(LENSES)

    def update(self, batch: Batch, geometry: Geometry, classes: Tensor) -> None:
        """Read a batch and score it, in parts that fit; `classes` is the data's `label_map`."""
        if len(batch) > 1 and self._bytes_an_image * len(batch) > BYTES_OF_LOGITS:
            for half in batch.half():
                self.update(half, geometry, classes)
            return
        for part, logits in run_in_halves(
            lambda each: (each, look(self.view, each.views[geometry][0], self.lenses)), batch
        ):
            self._score(part, geometry, logits, classes[part.labels])

    def _score(
        self,
        batch: Batch,
        geometry: Geometry,
        logits: Mapping[tuple[str, str], Tensor],
        labels: Tensor,
    ) -> None:
        final = logits["raw", "cls"][-1, :, 0]
        images, ids = batch.views[geometry]
        labels, masks = labels.to(final.device), None
        if ids is not None:
            at_centres = at_patch_centres(ids, self.grid).to(final.device)
            masks = (at_centres == batch.labels[:, None].to(final.device) + 1, at_centres == IGNORE)
        for key, of_lens in logits.items():
            self.scores[key].update(of_lens, final, labels)
        maps = [
            scores.update(logits[lens, "patches"], labels, masks)
            for lens, scores in self.maps.items()
        ]
        self.leaving.update(
            batch.index,
            torch.cat([_sureness(logits[lens, "cls"], final, labels) for lens in LENSES], 1),
        )
        there = torch.tensor([int(i) in self.kept for i in batch.index])
        rows = [
            batch.labels[there, None],
            _pixels(images[there], geometry),
            torch.stack(maps, 1).cpu()[there],
        ]
        self.examples.update(
            batch.index[there], torch.cat([part.double().flatten(1) for part in rows], 1)
        )


def _sureness(logits: Tensor, final: Tensor, labels: Tensor) -> Tensor:
    """Confidence after every step, then whether the answer is right ``(B, 2 T)``; after T as the
    model itself."""
    answers = torch.cat([logits[:-1, :, 0], final[None]]).double()
    return torch.cat(
        [answers.softmax(-1).amax(-1).T, (answers.argmax(-1) == labels).double().T], 1
    ).cpu()


def _pixels(images: Tensor, geometry: Geometry) -> Tensor:
    """The images as seen ``(B, height, width, 3)``, uint8."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (geometry.mean, geometry.std))
    return ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def leave(confidence: np.ndarray, right: np.ndarray, threshold: float) -> dict[str, float]:
    """Images that leave after the first step that is surer than `threshold`, else after the last.

    Parameters
    ----------
    confidence, right : ``(n, T)``, largest probability and whether the answer is right, after every
        step.

    Returns
    -------
    Accuracy (`value`, Wilson's `low` and `high`), `null` if as many left at each step but drawn at
    random, and `mean_step`.
    """
    sure = confidence > threshold
    sure[:, -1] = True
    left = sure.argmax(1)
    hits, n = right[np.arange(len(left)), left].sum(), len(left)
    low, high = wilson_interval(hits, n)
    shares = np.bincount(left, minlength=sure.shape[1]) / n
    null = float(shares @ right.mean(0))
    return {
        "value": hits / n,
        "low": low,
        "high": high,
        "null": null,
        "mean_step": float(left.mean() + 1),
    }
