"""Which pictures excite the same neuron at every step, and do they turn from texture to structure?

Fig. 3, section 4.2.1 of bViT (arXiv 2605.10661): for a neuron f of the FFN and a step t, the image
that maximises the mean of `mlp_post` over the patches (CLS and registers left out) at that step.
The paper says no more than "optimization based visualization"; method and defaults are those of
Ghiasi et al. (2022, arXiv 2212.06727), see `probes.maximise`. All images start alike and see the
same augmentations.

Ours: `--neurons auto` chooses among the neurons that answer at every step (spread over the real
images above a tenth of the step's median). They are ranked by `change`, 1 - the mean correlation,
over the images, of their answers at successive steps, and taken at even quantiles of it: the
steadiest, the median, the most changing. "Texture to structure" is tested as a falling spectral
centroid: `trend` is the mean over neurons of Spearman's correlation of centroid and step; its null,
and that of the mean centroid of a step, shuffles the steps of each neuron (2,000 times). Pictures
that excite their neuron no more than the best real image have found nothing and are left out of
that: where GELU is flat only total variation acts, and smooths. `--site mlp_pre` maximises the
neuron before GELU, which is never flat. An untrained model (timm:NAME@random) is a second null. Of
a stacked ViT, f is another neuron in each block.

Cost: `copies` forwards and backwards up to the step, an iteration and pair; at width 128 and 65
tokens 0.06 s on one core, so 14 minutes for 3 neurons x 12 steps x 400 iterations. Pairs are
written as they finish, and continued with. Expected: in the paper edges and textures at early
steps, composite patterns at late ones; no number is printed.
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
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.analyses.features import COLUMNS, Config
from bvit_interp.analyses.features.maximise import Neurons, maximise_in_chunks
from bvit_interp.analyses.features.profiles import StepProfiles, answers, from_steady_to_changing
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import spectral_centroid
from bvit_interp.metrics.streaming.top_images import TopList
from bvit_interp.probes.probe import Probe
from bvit_interp.results import Table, rank_and_world, replacing


def measure(
    models: Mapping[str, VisionTransformer],
    data: Samples,
    config: Config,
    folder: Path | None = None,
    table: Table | None = None,
) -> pd.DataFrame:
    """Pictures of every model, neuron and step, and the real images beside them.

    Parameters
    ----------
    models : name -> model; all see each real image in one pass.
    data : images; their labels are not used.
    folder : where the pictures go; without it none are kept.
    table : pairs already there are not made again; finished ones are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    geometries = {name: Geometry.of(model, data, config.resize) for name, model in models.items()}
    neurons_of = {
        name: Neurons(model, geometries[name].mean, geometries[name].std)
        for name, model in models.items()
    }
    steps = {name: _steps(name, of, config) for name, of in neurons_of.items()}
    tops, profiles = _watch(models, data, config)
    chosen = {name: _chosen(name, profile, config) for name, profile in profiles.items()}
    rows: list[dict[str, Any]] = []
    for name, of in neurons_of.items():
        pairs = [
            {"model": name, "neuron": neuron, "step": step}
            for neuron in chosen[name]
            for step in steps[name]
        ]
        lacking = [pair for pair in pairs if table is None or not table.has(**pair)]
        for pair, image, numbers in _make(of, lacking, config):
            neuron, step = pair["neuron"], pair["step"]
            best = {key: values[step - 1, neuron] for key, values in tops[name].items()}
            real, grid = best["values"][0].item(), of.model.patch_embed.grid_size
            rows.append(
                {
                    **pair,
                    **numbers,
                    "real": real,
                    "ratio": numbers["activation"] / real if real > 0 else math.nan,
                    "found": int(numbers["activation"] > real),
                    **dict.fromkeys(_OF_ALL, math.nan),
                    "change": profiles[name]["change"][neuron].item(),
                    "top": _listed(best, grid),
                    "grid": f"{grid[0]}x{grid[1]}",
                    "n": int(profiles[name]["count"]),
                    "iterations": config.iterations,
                    "path": _keep(pair, image, best["images"], data, geometries[name], folder),
                }
            )
            if table is not None:
                table.append(rows[-1])
    frame = pd.DataFrame(rows if table is None else table.rows)
    return _with_trend(frame, config)[list(COLUMNS)]


def _steps(name: str, of: Neurons, config: Config) -> list[int]:
    """The steps asked for, counted from 1; refuses steps and neurons that the model has not."""
    try:
        for neuron in config.neurons if config.neurons != "auto" else ():
            of.check(int(neuron), 1)
        return list(
            dict.fromkeys(of.check(0, step) for step in config.steps or range(1, of.num_steps + 1))
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _watch(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """What `TopList` and `StepProfiles` say of every model's neurons, in one pass over the real
    images."""
    probes = {name: Probe(model) for name, model in models.items()}
    tops, profiles = dict[str, TopList](), dict[str, StepProfiles]()
    for name, probe in probes.items():
        size, device = (probe.num_steps, probe.num_neurons), next(probe.model.parameters()).device
        tops[name], profiles[name] = (
            TopList(*size, config.top).to(device),
            StepProfiles(*size).to(device),
        )
    loader, geometries = config.loader(data, models, "features")
    for batch in loader:
        for name, probe in probes.items():
            parts = run_in_halves(
                lambda part, p=probe, g=geometries[name]: (
                    part.index,
                    *answers(p, part.views[g][0]),
                ),
                batch,
            )
            for index, means, patches in parts:
                tops[name].update(means, patches, index)
                profiles[name].update(means)
    return {name: top.compute() for name, top in tops.items()}, {
        name: p.compute() for name, p in profiles.items()
    }


def _chosen(name: str, profile: Mapping[str, Tensor], config: Config) -> list[int]:
    """The neurons asked for, or those that auto means."""
    if config.neurons != "auto":
        return list(dict.fromkeys(int(neuron) for neuron in config.neurons))
    try:
        return from_steady_to_changing(profile, config.count)
    except UserError as error:
        raise UserError(f"{name}: {error}; name some with --neurons, or give more images") from None


def _make(
    of: Neurons, pairs: list[dict[str, Any]], config: Config
) -> Iterator[tuple[dict[str, Any], np.ndarray, dict[str, float]]]:
    """The pairs in order, each with its picture ``(3, height, width)`` in 0..1 and the picture's
    numbers."""
    neurons, steps = (torch.tensor([pair[key] for pair in pairs]) for key in ("neuron", "step"))
    title = f"features {pairs[0]['model']}" if pairs else ""
    for part, start, images in maximise_in_chunks(
        of, neurons, steps, config._recipe(), config.chunk, title
    ):
        with torch.no_grad():
            reached, begun = (
                of(these, neurons[part], steps[part]).tolist()
                for these in (images, start.expand_as(images))
            )
        centroids, null = spectral_centroid(images).tolist(), spectral_centroid(start).item()
        for i, pair in enumerate(pairs[part]):
            yield (
                pair,
                images[i].numpy(),
                {
                    "activation": reached[i],
                    "start": begun[i],
                    "centroid": centroids[i],
                    "centroid_start": null,
                },
            )


def _listed(best: Mapping[str, Tensor], grid: tuple[int, int]) -> str:
    """The column `top` of a neuron and step."""
    places = zip(best["images"].tolist(), best["patches"].tolist(), strict=True)
    return " ".join(
        f"{image}:{patch // grid[1]},{patch % grid[1]}" for image, patch in places if image >= 0
    )


def _keep(
    pair: Mapping[str, Any],
    image: np.ndarray,
    best: Tensor,
    data: Samples,
    geometry: Geometry,
    folder: Path | None,
) -> str | None:
    """The PNG of a picture and of the images `best`, written by the first process."""
    if folder is None:
        return None

    name = pair["model"].replace("/", "_").replace("@", "_")
    path = folder / "features" / f"{name}_neuron{pair['neuron']}_step{pair['step']}.png"
    if rank_and_world()[0] == 0:
        plain = replace(geometry, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        real = [plain(data.read(i)[0])[0].numpy() for i in best.tolist() if i >= 0]
        strip = np.concatenate([image, *real], axis=2).clip(0, 1).transpose(1, 2, 0)
        with replacing(path) as temporary:
            Image.fromarray((255 * strip).round().astype(np.uint8)).save(temporary, format="PNG")
    return str(path)


_OF_ALL = (
    "rho",
    "trend",
    "trend_low",
    "trend_high",
    "band_low",
    "band_high",
)  # filled when all pictures are there


def _with_trend(frame: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The table with the trends of the centroid, of the pictures that count, and their nulls."""
    for _, part in frame.groupby("model", sort=False):
        counted = part.assign(centroid=part["centroid"].where(part["found"] > 0))
        centroids = counted.pivot(index="neuron", columns="step", values="centroid")
        shuffled = metrics.shuffled_rows(centroids.to_numpy(), config.seed)
        rho, draws = metrics.rank_trend(centroids.to_numpy()), metrics.rank_trend(shuffled)
        low, high = metrics.interval(metrics.mean_over_images(draws.T))
        bands = [
            metrics.interval(metrics.mean_over_images(at_step.T))
            for at_step in shuffled.transpose(2, 0, 1)
        ]
        of_step = dict(zip(centroids.columns, bands, strict=True))
        frame.loc[part.index, "rho"] = part["neuron"].map(
            dict(zip(centroids.index, rho, strict=True))
        )
        for key, value in (
            ("trend", float(metrics.mean_over_images(rho))),
            ("trend_low", low),
            ("trend_high", high),
        ):
            frame.loc[part.index, key] = value
        frame.loc[part.index, ["band_low", "band_high"]] = [of_step[step] for step in part["step"]]
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All of it."""
    return frame
