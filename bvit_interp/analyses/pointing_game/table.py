"""The table of one model, from its hits per image.

Every number is a mean over images, with a bootstrap interval where the images are the draws. All
columns are resampled together, so a difference of two has the interval of a paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from bvit_interp import metrics

OfImages = Float[np.ndarray, " images"]
OfHeads = Float[np.ndarray, "images steps heads"]


class Heads(NamedTuple):
    """Hits per image, step and head."""

    hits: OfHeads
    """nan where the point is ignored."""
    others: OfHeads
    """Hit ratio of the same point with the masks of the other images."""
    moved: OfHeads
    """By how much the image's mask moves the mean of `others`; see `game.on_other_masks`."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What is known of the images that show their object."""

    labels: OfImages
    nulls: dict[str, OfImages]
    """Column -> hit of a null that needs no model, or the area."""
    trained: Heads
    untrained: Heads | None = None


def table(
    scored: Scored, *, by_class: bool = False, seed: int = 0, **shared: object
) -> pd.DataFrame:
    """Rows of every step and head, of their mean and of the best head.

    Parameters
    ----------
    by_class : mean over the means of the classes, instead of over the images.
    seed : random seed for the bootstrap, and for the halves that choose and score the best head.
    shared : columns that are the same in all rows.
    """
    classes = scored.labels if by_class else None
    nulls = {
        column: float(metrics.mean_over_images(values[:, None], classes)[0])
        for column, values in scored.nulls.items()
    }
    entries = _entries_by_step(scored.trained, classes, seed)
    before = _untrained_by_step(scored, classes, seed)
    rows = [
        {**shared, **nulls, **start, "step": t + 1, **entry}
        for t, (of_step, start) in enumerate(zip(entries, before, strict=True))
        for entry in of_step
    ]
    return pd.DataFrame(rows).astype({"chosen_head": "Int64"})


@dataclass(frozen=True)
class _Columns:
    """Means over images of columns, and their bootstrap draws."""

    hits: Float[np.ndarray, " images *columns"]
    ratio: Float[np.ndarray, "*columns"]
    gain: Float[np.ndarray, "*columns"]
    ratio_draws: Float[np.ndarray, " draws *columns"]
    gain_draws: Float[np.ndarray, " draws *columns"]

    @classmethod
    def of(cls, heads: Heads, classes: OfImages | None, seed: int) -> _Columns:
        hits, others, moved = heads
        gains = hits - others
        images, *shape = hits.shape
        flat = np.concatenate([hits.reshape(images, -1), gains.reshape(images, -1)], axis=1)
        both = metrics.bootstrap_means(flat, classes, seed).reshape(-1, 2, *shape)
        # the same resamples: they have the same seed
        of_masks = metrics.bootstrap_means(moved.reshape(images, -1), None, seed)
        return cls(
            hits,
            metrics.mean_over_images(hits, classes),
            metrics.mean_over_images(gains, classes),
            both[:, 0],
            both[:, 1] - of_masks.reshape(-1, *shape),
        )

    def __getitem__(self, column: tuple[int, int | slice]) -> _Columns:
        of_all = (slice(None), *column)
        return _Columns(
            self.hits[of_all],
            np.asarray(self.ratio[column]),
            np.asarray(self.gain[column]),
            self.ratio_draws[of_all],
            self.gain_draws[of_all],
        )

    def over_heads(self) -> _Columns:
        """The mean over the heads of a step; an image is ignored if it is by every head."""
        mean = metrics.mean_over_images  # over the heads in place of the images
        ignored = np.isnan(self.hits).all(-1)
        return _Columns(
            np.where(ignored, np.nan, 0.0),
            mean(self.ratio),
            mean(self.gain),
            mean(np.moveaxis(self.ratio_draws, -1, 0)),
            mean(np.moveaxis(self.gain_draws, -1, 0)),
        )

    def row(self, head: str, chosen_head: int | None = None) -> dict[str, Any]:
        """The row of a single column."""
        n_ignored = int(np.isnan(self.hits).sum())
        low, high = metrics.interval(self.ratio_draws)
        gain_low, gain_high = metrics.interval(self.gain_draws)
        return {
            "head": head,
            "hit_ratio": float(self.ratio),
            "low": low,
            "high": high,
            "gain": float(self.gain),
            "gain_low": gain_low,
            "gain_high": gain_high,
            "other_masks": float(self.ratio - self.gain),
            "n": len(self.hits) - n_ignored,
            "n_ignored": n_ignored,
            "chosen_head": chosen_head,
        }


def _entries_by_step(
    heads: Heads, classes: OfImages | None, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """Every head, their mean, the best head, and the best head chosen and scored on two halves."""
    images, steps, count = heads.hits.shape
    if count == 1:
        columns = _Columns.of(heads, classes, seed)
        yield from ([columns[t, 0].row("all")] for t in range(steps))
        return
    first_half = np.random.default_rng(seed).permutation(images) % 2 == 0
    best_of_first, best_of_second = (
        _best(
            metrics.mean_over_images(heads.hits[half], None if classes is None else classes[half])
        )
        for half in (first_half, ~first_half)
    )
    # each image is scored by the head that is best on the half without it
    chosen = np.where(first_half[:, None], best_of_second, best_of_first)[..., None]
    hits, others = (np.take_along_axis(each, chosen, -1) for each in (heads.hits, heads.others))
    # a mask is pointed at by the images of both halves
    moved = heads.moved[:, np.arange(steps), [best_of_first, best_of_second]].mean(1)[..., None]
    split = Heads(hits, others, moved)
    joined = (np.concatenate(pair, axis=-1) for pair in zip(heads, split, strict=True))
    columns = _Columns.of(Heads(*joined), classes, seed)
    for t in range(steps):
        best = int(_best(columns.ratio[t, :count]))
        yield [
            *(columns[t, head].row(str(head)) for head in range(count)),
            columns[t, slice(count)].over_heads().row("mean"),
            columns[t, best].row("best", best),
            columns[t, count].row("best-split", int(best_of_first[t])),
        ]


def _untrained_by_step(
    scored: Scored, classes: OfImages | None, seed: int
) -> Iterator[dict[str, float]]:
    """Columns of the untrained model per step; nan without one."""
    names = [f"untrained_{name}" for name in ("hit_ratio", "gain", "gain_low", "gain_high")]
    if scored.untrained is None:
        yield from (dict.fromkeys(names, math.nan) for _ in range(scored.trained.hits.shape[1]))
        return
    columns = _Columns.of(scored.untrained, classes, seed)
    for t in range(len(columns.ratio)):
        row = columns[t, slice(None)].over_heads().row("mean")
        yield {name: row[name.removeprefix("untrained_")] for name in names}


def _best(ratios: Float[np.ndarray, "*steps heads"]) -> Any:
    """Index of the highest ratio along the last axis; 0 if none is a number."""
    return np.argmax(np.where(np.isnan(ratios), -1.0, ratios), axis=-1)
