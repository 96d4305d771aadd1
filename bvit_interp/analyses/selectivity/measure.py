"""Class selectivity of all units at all steps, and ablation of some.

Ours; not in bViT (arXiv 2605.10661), whose Fig. 3 shows pictures of a few neurons. The response of
a neuron to an image is the mean of `mlp_post` over the patches; that of a head is the mean norm of
`z` over the patches. The profile of a unit at a step is its mean response to each class.
`selectivity` is the share of the variance of the response over images that lies between classes,
eta^2, debiased: it is 0 on average where labels are permuted. A unit is selective at a step where
its selectivity is at least `threshold` and significant by the F test (0.05, Bonferroni over all
units and steps). `onset` and `offset` are its first and last such step. `profile_change` is 1 - the
correlation of the profiles of successive steps, and `profile_stability` is the mean correlation of
any two, over selective steps. `share_class`, `share_step` and `share_interaction` divide the
variance of a unit's table of class means, classes x steps, and sum to 1. `reliability` correlates
the profiles of two random halves of the images. Formulas and sources are in `class_selectivity.py`
and `profiles.py`.

Onset and offset lie at another distance in every unit, so a mean over units is taken only over
profiles that are equally many steps apart: `window_r` correlates the profiles of steps s and s + w,
for w of 1, T / 2 and T - 1, over the units that are selective at both. Noise of the images lowers
it; `window_r_corrected` is divided by the root of the product of the two reliabilities
(disattenuation, Spearman, 1904). Units with a reliability below 0.3 at either step are left out of
both, because the quotient would be mostly noise. Intervals are over units (bootstrap).

Nulls: images in random groups in place of classes (selectivity, selective units, shares); the
profile of the next unit in place of a unit's own (changes of profile, windows, reliability); random
units of the same site (ablation). Described units are ablated to their mean at each token, at one
step and at all steps, and the table has their class means, top-k images, and the effect on accuracy
and on the logit of the true class; the report has a page for each. A unit of a stacked ViT is a
different unit in each block, tied to the others only by its number: its profiles show what a shared
block must beat.

Cost: one forward per image, and V (T + 3) / 2 forwards for each of the `n_ablated` images with V
ablated units, up to 14 by default. Two models of width 128, 1000 images of 32 px, 200 of them
ablated: 316 s of one core's time. Estimated from the number of forwards, not measured: all of
ImageNet is one pass and 10,000 more images; the sums take 0.9 GB per bViT-B. Expected: none
published. If neurons of a shared block keep their meaning, their profiles change less than a
stack's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from bvit_interp.analyses.selectivity import COLUMNS, RANKED, UNIT_NAMES, Config, tables
from bvit_interp.analyses.selectivity.contact_sheet import contact_sheet
from bvit_interp.analyses.selectivity.responses import (
    HALVES,
    ResponseStatistics,
    UnitResponses,
    unit_responses,
)
from bvit_interp.analyses.selectivity.unit_ablation import AblationEffects, Unit, ablation_effects
from bvit_interp.analyses.selectivity.unit_statistics import UnitStatistics
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MeanCI
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model
from bvit_interp.probes.probe import Probe
from bvit_interp.results import file_stem, rank_and_world, replacing, write_arrays

_SITES = ("mlp_post", "z")


@for_any_model
def measure(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Class selectivity of every unit of every model.

    Parameters
    ----------
    models : name -> model; all see each image in the same two passes.
    data : labelled images, of the models' classes.
    folder : where the top-k images and the .npz go; by default neither is written.

    Returns
    -------
    A table of `COLUMNS`.
    """
    probes = {name: Probe(model) for name, model in models.items()}
    given = {name: _parse_units(name, probe, config.units) for name, probe in probes.items()}
    responses = _response_statistics(models, probes, data, config)
    statistics = {
        name: {
            site: UnitStatistics.from_sums(sums.compute(), config.threshold)
            for site, sums in seen.class_sums.items()
        }
        for name, seen in responses.items()
    }
    described = {name: given[name] or _first_units(statistics[name], config) for name in models}
    random = {name: _random_units(probe, config) for name, probe in probes.items()}
    ablations = {
        name: _Ablation(
            probe,
            units=list(dict.fromkeys(described[name] + random[name])),
            responses=responses[name],
            zero=config.zero,
        )
        for name, probe in probes.items()
    }
    _ablate(models, ablations, data, config)
    frames = []
    for name, model in models.items():
        subject = _Subject(
            name=name,
            geometry=Geometry.of(model, data, config.resize),
            grid=probes[name].grid,
            responses=responses[name],
            statistics=statistics[name],
        )
        parts = subject.tables(described[name], data, config, folder)
        parts += ablations[name].tables(described[name], random[name])
        frames.append(pd.concat(parts).assign(model=name))
    frame = pd.concat(frames, ignore_index=True).reindex(columns=list(COLUMNS))
    numbers = ["value", "low", "high", "null"]
    # float32 has no more digits, and the file is half as long
    frame[numbers] = frame[numbers].astype(float).round(7)
    return frame.astype(
        {"unit": "Int64", "step": "Int64", "rank": "Int64", "n": "Int64", "window": "Int64"}
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over a model's neurons, and the first two neurons of each ranked list."""
    means = frame["unit"].isna() & frame["step"].isna()
    ranked = frame["metric"].isin(RANKED) & (frame["rank"] <= 2)
    kept = frame[(means | ranked) & (frame["site"] == "mlp_post")]
    return kept[["model", "metric", "window", "unit", "value", "low", "high", "null", "n", "rank"]]


def _parse_units(name: str, probe: Probe, units: tuple[str, ...]) -> list[Unit]:
    """Site and number of units written as `mlp_post:374` or `z:2`; an error names the model."""
    parsed = []
    for text in units:
        site, _, number = text.partition(":")
        try:
            probe.address(f"{site}[1]:{number}")
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        parsed.append((site, int(number)))
    return parsed


def _first_units(statistics: Mapping[str, UnitStatistics], config: Config) -> list[Unit]:
    """The first units of each ranked list, neurons and then heads."""
    return [
        (site, unit)
        for site in _SITES
        for unit in statistics[site].first_of(RANKED, config.count, config.min_lifetime)
    ]


def _random_units(probe: Probe, config: Config) -> list[Unit]:
    """Random neurons, then random heads."""
    rng = np.random.default_rng(config.seed)
    sizes = {"mlp_post": probe.num_neurons, "z": probe.num_heads}
    return [
        (site, int(unit))
        for site in _SITES
        for unit in rng.permutation(sizes[site])[: config.random_units]
    ]


def _response_statistics(
    models: Mapping[str, Model],
    probes: Mapping[str, Probe],
    data: Samples,
    config: Config,
) -> dict[str, ResponseStatistics]:
    """Responses of all units, accumulated in one pass; halves and groups are drawn from the seed.

    Raises
    ------
    UserError
        For fewer than two images.
    """
    positions = evenly_spaced(len(data), config.limit)
    if len(positions) < HALVES:
        raise UserError(
            f"the images are divided into halves: at least 2 are needed, got {len(positions)}"
        )
    draws = torch.zeros(len(data), dtype=torch.int64)
    draws[positions] = torch.from_numpy(
        np.random.default_rng(config.seed).permutation(len(positions))
    )
    classes = len(data.classes)
    statistics = {
        name: ResponseStatistics(probe, classes, config.n_top) for name, probe in probes.items()
    }

    def respond(batch: ModelBatch) -> tuple[ModelBatch, dict[str, UnitResponses]]:
        return batch, unit_responses(probes[batch.model], batch.images)

    for name, (batch, seen) in stream(models, data, config, respond, progress="selectivity"):
        halves, groups = draws[batch.index] % HALVES, draws[batch.index] // HALVES % classes
        statistics[name].update(seen, batch.data_labels.cpu(), halves, groups, batch.index)
    return statistics


class _Ablation:
    """Units of a model to ablate, and the means of what that does.

    Parameters
    ----------
    probe : of the model.
    units : site and number of each.
    responses : where the mean activations come from.
    zero : ablate to zero instead of the means.

    Attributes
    ----------
    changes : means of `AblationEffects.changes`.
    hits : accuracy of the model without ablation.
    """

    def __init__(
        self, probe: Probe, units: list[Unit], responses: ResponseStatistics, zero: bool
    ) -> None:
        self.probe, self.units = probe, units
        means = {site: metric.compute().float() for site, metric in responses.site_means.items()}
        self.fill = None if zero else means
        device = device_of(probe.model)
        self.changes = MeanCI(2, probe.num_steps + 1, len(units)).to(device)
        self.hits = MeanCI(1).to(device)

    def effects(self, images: Tensor, labels: Tensor) -> AblationEffects:
        """Effects on the answers to a batch."""
        return ablation_effects(self.probe, images, labels, self.units, self.fill)

    def update(self, effects: AblationEffects) -> None:
        """Add the effects on a batch."""
        self.hits.update(effects.hits[:, None])
        self.changes.update(effects.changes)

    def tables(self, described: list[Unit], random: list[Unit]) -> list[pd.DataFrame]:
        """Rows of the described units, and the accuracy of the model."""
        changes, hits = self.changes.compute(), self.hits.compute()
        return [
            *tables.ablation_rows(changes, self.units, described, random),
            tables.accuracy_row(hits),
        ]


def _ablate(
    models: Mapping[str, Model],
    ablations: Mapping[str, _Ablation],
    data: Samples,
    config: Config,
) -> None:
    """Ablate the units of every model in one pass over `n_ablated` images."""

    def compute(batch: ModelBatch) -> AblationEffects:
        return ablations[batch.model].effects(batch.images, batch.labels)

    limit = min(config.n_ablated, config.limit or config.n_ablated)
    fewer, text = replace(config, limit=limit), "selectivity, ablation"
    for name, effects in stream(models, data, fewer, compute, progress=text, labels=True):
        ablations[name].update(effects)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model, and everything that its table is made from but the ablation."""

    name: str
    geometry: Geometry
    grid: tuple[int, int]
    responses: ResponseStatistics
    statistics: dict[str, UnitStatistics]

    def tables(
        self, described: list[Unit], data: Samples, config: Config, folder: Path | None
    ) -> list[pd.DataFrame]:
        """Rows of all units, then of the described ones; every process takes part."""
        firing = self.responses.firing.compute()
        parts: list[pd.DataFrame] = []
        for site, statistics in self.statistics.items():
            parts += tables.site_rows(site, statistics, data.classes, config.min_lifetime)
        path = None if folder is None else folder / f"selectivity_{file_stem(self.name)}.npz"
        if path is not None:
            self._write_arrays(path, firing["value"], data)
            parts = [
                part.assign(path=str(path)) if part["unit"].isna().all() else part for part in parts
            ]
        for site, unit in described:
            statistics = self.statistics[site]
            parts.append(
                tables.profile_rows(site, unit, statistics, data.classes, config.profile_classes)
            )
            if site == "mlp_post":
                parts.append(tables.firing_rows(unit, firing))
            parts.append(self._top_images(site, unit, data, folder))
        return parts

    def _write_arrays(self, path: Path, firing: Tensor, data: Samples) -> None:
        """The class means and firing rates of all units; the table has them for described units."""
        arrays = {
            f"{UNIT_NAMES[site]}_class_means": statistics.means.float().numpy()
            for site, statistics in self.statistics.items()
        }
        arrays["neuron_firing"] = firing.float().numpy()
        classes = self.statistics["mlp_post"].classes.tolist()
        arrays["classes"] = np.array([data.classes[c] for c in classes])
        write_arrays(path, **arrays)

    def _top_images(self, site: str, unit: int, data: Samples, folder: Path | None) -> pd.DataFrame:
        """The top-k images of a unit at every step, and a PNG of them with one row per step."""
        top = {
            key: values[:, unit].cpu()
            for key, values in self.responses.top_images[site].compute().items()
        }
        path = None
        if folder is not None:
            path = folder / "selectivity" / f"{file_stem(self.name)}_{UNIT_NAMES[site]}{unit}.png"
            if rank_and_world()[0] == 0:
                sheet = self._contact_sheet(top, data)
                with replacing(path) as temporary:
                    Image.fromarray(sheet).save(temporary, format="PNG")
        return tables.top_image_rows(site, unit, top, self.grid, path)

    def _contact_sheet(self, top: Mapping[str, Tensor], data: Samples) -> np.ndarray:
        rows = []
        for numbers, patches in zip(top["images"].tolist(), top["patches"].tolist(), strict=True):
            pairs = zip(numbers, patches, strict=True)
            rows.append([(self._pixels(n, data), patch) for n, patch in pairs if n >= 0])
        return contact_sheet(rows, self.grid)

    def _pixels(self, number: int, data: Samples) -> np.ndarray:
        """An image as the model sees it, ``(height, width, 3)`` uint8."""
        return self.geometry.to_pixels(self.geometry(data.read(number)[0])[0]).numpy()
