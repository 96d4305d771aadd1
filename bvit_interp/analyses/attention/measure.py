"""Attention entropy, distance, shares and correlations of every head.

Fig. 10-13, section 4.2.2 and Appendix F of bViT (arXiv 2605.10661) show where heads look; these
numbers beside them are ours. For each step and head: entropy of the CLS row, attention distance
between patches (Dosovitskiy et al., 2021; Raghu et al., 2021), attention of CLS on itself, on
registers and on patches, attention of patches on CLS, and attention rollout (Abnar & Zuidema,
2020). `step_correlation` is Pearson's correlation over patches of a head's CLS map at step s with
its own at step t. A head of a bViT has the same weights at every step; in a stack, head h of two
blocks has only its number in common.

Nulls: `null` is the value for uniform attention; for `step_correlation` it is the mean correlation
of different heads at the two steps. `null_other_images` correlates maps of different images, which
measures what depends on the position of a patch alone. `p_value` is a permutation test: the share
of pairings of the heads at s with those at t whose total correlation is at least that of equal
numbers. Without a CLS token only the distance is measured. In a model with a memory the attention
is that of the step's own block.

Cost: one forward per image with the full pattern of one step at a time, B x H x N x N numbers (0.1
GB for bViT-B and 64 images; about four times that in use). 300 images of 32 px and two models of
width 128 take 8 s on one core. Expected: the paper prints no number; it says that fixed heads
localise at middle or late steps and change their role.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.analyses.attention import COLUMNS, Config
from bvit_interp.analyses.attention.patterns import (
    AttentionStatistics,
    attention_statistics,
    metric_names,
    uniform_value,
)
from bvit_interp.data.samples import Samples, Subset, evenly_spaced
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.means import MapCorrelations, MeanCI
from bvit_interp.metrics.streaming.statistics import PerImage
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model
from bvit_interp.probes import saliency
from bvit_interp.probes.probe import Probe
from bvit_interp.results import file_stem, write_arrays

_NORMALISED = {
    "attention_entropy": "normalised_entropy",
    "attention_distance": "normalised_distance",
}


@for_any_model
def measure(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    folder: Path | None = None,
) -> pd.DataFrame:
    """Attention statistics of every model, step and head.

    Parameters
    ----------
    models : name -> model; all models see each image in one pass.
    data : images; their labels are not used.
    folder : folder for the example maps; without it none are stored.

    Returns
    -------
    A table of `COLUMNS`.
    """
    positions = _example_positions(data, config) if folder else []
    probes = {name: Probe(model) for name, model in models.items()}
    totals = {name: _Totals(probe) for name, probe in probes.items()}

    def reduce(batch: ModelBatch) -> AttentionStatistics:
        return attention_statistics(probes[batch.model], batch.images)

    for name, statistics in stream(models, data, config, reduce, progress="attention"):
        totals[name].update(statistics)
    paths: dict[str, str] = {}
    if folder is not None and positions:
        with_cls = {name: model for name, model in models.items() if "cls" in probes[name].kinds()}
        paths = _write_examples(with_cls, data, positions, config, folder)
    tables = [
        pd.DataFrame(totals[name].rows(config.seed))
        .assign(model=name)
        .reindex(columns=list(COLUMNS))
        .assign(path=paths.get(name))
        for name in probes
    ]
    return pd.concat(tables, ignore_index=True).astype({"other_step": "Int64"})


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The means over heads, without the correlations between steps."""
    return frame[(frame["head"] == "mean") & frame["other_step"].isna()]


class _Totals:
    """Streaming statistics of one model."""

    def __init__(self, probe: Probe) -> None:
        steps, heads = probe.num_steps, probe.num_heads
        self.probe = probe
        self.step_pairs = torch.triu_indices(steps, steps, 1)
        self.means = {name: MeanCI(steps, heads + 1) for name in metric_names(probe)}
        self.correlations: dict[str, MapCorrelations] = {}
        if "cls" in probe.kinds():
            self.means["rollout_entropy"] = MeanCI(steps, 1)
            self.means["rollout_correlation"] = MeanCI(steps, 1)
            self.means["step_correlation"] = MeanCI(self.step_pairs.shape[1], heads + 1)
            patches = math.prod(probe.grid)
            self.correlations["step_correlation"] = MapCorrelations(steps, heads, patches)
            self.correlations["rollout_correlation"] = MapCorrelations(steps, 2, patches)
        for metric in (*self.means.values(), *self.correlations.values()):
            metric.to(device_of(probe.model))

    def update(self, statistics: AttentionStatistics) -> None:
        """Add a batch."""
        for name, values in statistics.metrics.items():
            self.means[name].update(_with_mean(values))
        if statistics.maps is None or statistics.rollout is None:
            return
        maps = metrics.unit_maps(statistics.maps)
        between_steps = metrics.correlations(maps.transpose(1, 2)).movedim(1, -1)  # (B, T, T, H)
        earlier, later = self.step_pairs
        self.means["step_correlation"].update(_with_mean(between_steps[:, earlier, later]))
        self.correlations["step_correlation"].update(maps)
        on_patches = statistics.rollout[..., -maps.shape[-1] :]
        mean_and_rollout = torch.stack([statistics.maps.mean(2), on_patches], dim=2)
        mean_and_rollout = metrics.unit_maps(mean_and_rollout)
        correlation = metrics.correlations(mean_and_rollout)[..., :1, 1]
        self.means["rollout_correlation"].update(correlation)
        self.means["rollout_entropy"].update(metrics.entropy(statistics.rollout)[..., None])
        self.correlations["rollout_correlation"].update(mean_and_rollout)

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """The table, without the model's name."""
        correlations = {
            name: {key: values.numpy() for key, values in pairs.compute().items()}
            for name, pairs in self.correlations.items()
        }
        scales = {
            "attention_entropy": uniform_value(self.probe, "attention_entropy"),
            "attention_distance": math.hypot(*self.probe.grid),
        }
        for name, mean in self.means.items():
            columns = {key: values.numpy() for key, values in mean.compute().items()}
            for i, head in np.ndindex(columns["value"].shape):
                row: dict[str, Any] = {
                    "metric": name,
                    "step": i + 1,
                    "head": "mean" if head == columns["value"].shape[1] - 1 else str(head),
                    **{key: values[i, head].item() for key, values in columns.items()},
                }
                if name == "step_correlation":
                    row |= self._step_correlation_nulls(correlations[name], i, row["head"], seed)
                elif name == "rollout_correlation":
                    row["null_other_images"] = correlations[name]["other_images"][i, 0, i, 1]
                else:
                    row["null"] = uniform_value(self.probe, name, i + 1)
                yield row
                if name in scales:
                    scaled = {
                        key: row[key] / scales[name] for key in ("value", "low", "high", "null")
                    }
                    yield {**row, **scaled, "metric": _NORMALISED[name]}

    def _step_correlation_nulls(
        self, correlations: Mapping[str, np.ndarray], pair: int, head: str, seed: int
    ) -> dict[str, Any]:
        """Steps and nulls of a pair of steps, from the correlations ``(T, H, T, H)`` of all
        maps."""
        earlier, later = self.step_pairs[:, pair].tolist()
        same_image = correlations["same_image"][earlier, :, later]
        other_images = np.diag(correlations["other_images"][earlier, :, later])
        different_heads = ~np.eye(len(same_image), dtype=bool)
        nulls: dict[str, Any] = {"step": earlier + 1, "other_step": later + 1}
        if head == "mean":
            nulls["null_other_images"] = _mean(other_images)
            nulls["p_value"] = metrics.pairing_p_value(same_image, seed)
        else:
            # this head at one of the steps, another head at the other
            different_heads[np.arange(len(same_image)) != int(head)] = False
            different_heads |= different_heads.T
            nulls["null_other_images"] = other_images[int(head)]
        return {**nulls, "null": _mean(same_image[different_heads])}


def _with_mean(values: Tensor) -> Tensor:
    """Values ``(..., H)``, followed by their mean over the heads; nan is left out."""
    return torch.cat([values, values.nanmean(-1, keepdim=True)], dim=-1)


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are numbers; nan if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _example_positions(data: Samples, config: Config) -> list[int]:
    """Positions of the example images in the data set."""
    if config.example_images is None:
        return evenly_spaced(len(data), config.n_examples) if config.n_examples else []
    if max(config.example_images, default=0) >= len(data):
        raise UserError(f"no image {max(config.example_images)}; images: 0..{len(data) - 1}")
    return list(dict.fromkeys(config.example_images))


def _write_examples(
    models: Mapping[str, Model],
    data: Samples,
    positions: list[int],
    config: Config,
    folder: Path,
) -> dict[str, str]:
    """Write the CLS maps of the example images, a file per model; name of the model -> path.

    A file has `index` ``(n,)``, positions in the data set; `image` ``(n, height, width, 3)`` uint8,
    as the model sees it; `maps` ``(n, T, H, rows, columns)`` float32.
    """
    probes = {name: Probe(model) for name, model in models.items()}
    pixels = {name: PerImage().to(device_of(model)) for name, model in models.items()}
    maps = {name: PerImage().to(device_of(model)) for name, model in models.items()}
    examples, options = Subset(data, positions), replace(config, limit=None, batch_size=1)

    def look(batch: ModelBatch) -> tuple[Tensor, Tensor, Tensor]:
        attended = saliency.attention(probes[batch.model], batch.images)
        seen = batch.geometry.to_pixels(batch.images)
        return batch.index.to(batch.device), seen.flatten(1), attended.float().flatten(1)

    for name, (index, seen, attended) in stream(
        models, examples, options, look, progress="attention maps"
    ):
        pixels[name].update(index, seen)
        maps[name].update(index, attended)
    paths = {}
    for name, probe in probes.items():
        index, seen = pixels[name].compute()
        _, attended = maps[name].compute()
        shape = (probe.num_steps, probe.num_heads, *probe.grid)
        height, width = probe.layout.image_size
        path = folder / f"attention_{file_stem(name)}.npz"
        write_arrays(
            path,
            index=np.array(positions)[
                index.flatten().numpy()
            ],  # of one image compute gives a scalar
            image=seen.byte().reshape(-1, height, width, 3).numpy(),
            maps=attended.float().reshape(-1, *shape).numpy(),
        )
        paths[name] = str(path)
    return paths
