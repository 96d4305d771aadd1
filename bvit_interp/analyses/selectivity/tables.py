"""Rows of the table of `selectivity`, from its statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from bvit_interp.analyses.selectivity import RANKED
from bvit_interp.analyses.selectivity.unit_ablation import Unit
from bvit_interp.analyses.selectivity.unit_statistics import UnitStatistics
from bvit_interp.metrics import bootstrap_means, interval, mean_over_images, wilson_interval


def site_rows(
    site: str, statistics: UnitStatistics, classes: Sequence[str], min_lifetime: int
) -> Iterator[pd.DataFrame]:
    """All statistics of all units of a site, and their means over units, also of profiles that are
    a fixed number of steps apart.

    Parameters
    ----------
    classes : names of the data set's classes.
    min_lifetime : units selective at fewer steps have no rank.
    """
    yield from _selectivity_rows(site, statistics, classes)
    yield _selective_share_rows(site, statistics)
    units, images = range(statistics.selective.shape[1]), statistics.selectivity.images
    for metric, columns in statistics.metrics.items():
        rows = _rows(metric, site, units, None, **columns, n=images)
        if metric in RANKED:
            ranking = statistics.ranking(metric, RANKED[metric], min_lifetime).tolist()
            ranks = {unit: rank for rank, unit in enumerate(ranking, start=1)}
            rows["rank"] = rows["unit"].map(ranks)
        yield rows
        if metric != "profile_change_ends":  # its windows differ in length from unit to unit
            yield _mean_over_units(metric, site, rows)
    for window, correlations in statistics.windows.items():
        for key, metric in (("raw", "window_r"), ("corrected", "window_r_corrected")):
            yield _window_rows(metric, site, window, correlations[key])


def _selectivity_rows(
    site: str, statistics: UnitStatistics, classes: Sequence[str]
) -> Iterator[pd.DataFrame]:
    selectivity, null = statistics.selectivity, statistics.null_selectivity.value
    low, high = selectivity.interval()
    names = [classes[c] for c in statistics.classes.tolist()]
    for t, value in enumerate(selectivity.value):
        columns = {
            "value": value,
            "low": low[t],
            "high": high[t],
            "null": null[t],
            "n": selectivity.images,
            "class": [names[c] for c in statistics.means[:, t].argmax(0).tolist()],
        }
        yield _rows("selectivity", site, range(len(value)), t + 1, **columns)


def _selective_share_rows(site: str, statistics: UnitStatistics) -> pd.DataFrame:
    steps, units = statistics.selective.shape
    shares = statistics.selective.double().mean(1)
    ends = np.array([wilson_interval(share * units, units) for share in shares.tolist()])
    columns = {
        "value": shares,
        "low": ends[:, 0],
        "high": ends[:, 1],
        "null": statistics.null_selective.double().mean(1),
        "n": units,
    }
    return _rows("selective_share", site, None, range(1, steps + 1), **columns)


def _mean_over_units(metric: str, site: str, rows: pd.DataFrame) -> pd.DataFrame:
    defined = rows[rows["value"].notna()]
    low, high = interval(bootstrap_means(defined[["value"]].to_numpy(float))[:, 0])
    columns = {
        "value": defined["value"].mean(),
        "low": low,
        "high": high,
        "null": defined["null"].mean() if "null" in defined else math.nan,
        "n": len(defined),
    }
    return _rows(metric, site, None, None, **columns)


def _window_rows(
    metric: str, site: str, window: int, correlations: Mapping[str, Tensor]
) -> pd.DataFrame:
    """Means over units of `window_correlations`, at each step and over all steps."""
    by_step, null = (correlations[key].T.numpy() for key in ("value", "null"))
    values, nulls = (
        np.column_stack([table, mean_over_images(table.T)]) for table in (by_step, null)
    )
    ends = np.array([interval(draws) for draws in bootstrap_means(values).T])
    columns = {
        "value": mean_over_images(values),
        "low": ends[:, 0],
        "high": ends[:, 1],
        "null": mean_over_images(nulls),
        "n": (~np.isnan(values)).sum(0),
    }
    steps = [*range(1, by_step.shape[1] + 1), None]
    return _rows(metric, site, None, steps, **columns, window=window)


def profile_rows(
    site: str, unit: int, statistics: UnitStatistics, classes: Sequence[str], count: int
) -> pd.DataFrame:
    """Class means of a unit, for the `count` classes whose means vary most over the steps."""
    means = statistics.means[:, :, unit]
    null, steps = means.mean(0), range(1, means.shape[1] + 1)
    deviations = (means - null).square().sum(1)
    chosen = deviations.argsort(descending=True, stable=True)[:count].sort().values
    names = {c: classes[int(statistics.classes[c])] for c in chosen.tolist()}
    parts = [
        _rows("class_mean", site, unit, steps, value=means[c], null=null, **{"class": name})
        for c, name in names.items()
    ]
    return pd.concat(parts)


def firing_rows(unit: int, firing: Mapping[str, Tensor]) -> pd.DataFrame:
    """Firing rates of a neuron at every step, from means ``(T, U)``."""
    columns = {key: values[:, unit] for key, values in firing.items()}
    steps = range(1, len(firing["value"]) + 1)
    return _rows("firing", "mlp_post", unit, steps, **columns)


def top_image_rows(
    site: str, unit: int, top: Mapping[str, Tensor], grid: tuple[int, int], path: Path | None
) -> pd.DataFrame:
    """Top-k images of a unit at every step.

    Parameters
    ----------
    top : values, images and patches, ``(T, k)`` each; an image of number -1 is left out.
    grid : rows and columns of patches in an image.
    path : the picture of these images.
    """
    images, patches = top["images"].tolist(), top["patches"].tolist()
    texts = [
        " ".join(
            f"{image}:{patch // grid[1]},{patch % grid[1]}"
            for image, patch in zip(*step, strict=True)
            if image >= 0
        )
        for step in zip(images, patches, strict=True)
    ]
    columns = {
        "value": top["values"][:, 0],
        "top_images": texts,
        "path": None if path is None else str(path),
    }
    return _rows("max_response", site, unit, range(1, len(images) + 1), **columns)


def ablation_rows(
    changes: Mapping[str, Tensor],
    ablated: Sequence[Unit],
    described: Sequence[Unit],
    random: Sequence[Unit],
) -> Iterator[pd.DataFrame]:
    """Effect of ablating each described unit, beside random units of its site.

    Parameters
    ----------
    changes : means and their intervals, ``(2, T + 1, V)``: changes of accuracy and of the logit, at
        each step and at every step, of each ablated unit.
    ablated : the V units.
    """
    steps = [*range(1, changes["value"].shape[1]), None]
    for i, metric in enumerate(("ablation_accuracy", "ablation_logit")):
        for site, unit in described:
            others = [
                ablated.index(other) for other in random if other[0] == site and other[1] != unit
            ]
            position = ablated.index((site, unit))
            columns = {key: values[i, :, position] for key, values in changes.items()}
            null = changes["value"][i][:, others].mean(1)
            yield _rows(metric, site, unit, steps, **columns, null=null)


def accuracy_row(hits: Mapping[str, Tensor]) -> pd.DataFrame:
    """Accuracy of the model, from the mean of its hits."""
    n, share = int(hits["n"]), float(hits["value"])
    low, high = wilson_interval(share * n, n)
    return _rows("accuracy", None, None, None, value=share, low=low, high=high, n=n)


def _rows(metric: str, site: str | None, unit: Any, step: Any, **columns: Any) -> pd.DataFrame:
    """Rows of a metric; `unit`, `step` and the columns are numbers, lists, ranges or tensors."""
    listed = {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in columns.items()
    }
    lengths = [
        len(value) for value in (unit, step, *listed.values()) if isinstance(value, (list, range))
    ]
    about = {"metric": metric, "site": site, "unit": unit, "step": step}
    return pd.DataFrame(about | listed, index=range(max(lengths, default=1)))
