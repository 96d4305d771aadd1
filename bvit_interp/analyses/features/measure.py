"""Images that excite each neuron at each step, and their centroids.

Fig. 3, section 4.2.1 of bViT (arXiv 2605.10661): for a neuron f of the FFN and a step t, the image
that maximises the mean of `mlp_post` over the patches (without CLS and registers) at that step. The
paper says only "optimization based visualization"; method and defaults are those of Ghiasi et al.
(2022, arXiv 2212.06727), see `maximise`. All images start from the same image and see the same
augmentations.

Ours: `--neurons auto` chooses among the neurons that respond at every step (their spread over the
real images is above a tenth of the step's median). They are ranked by `correlation_distance`, 1 -
the mean correlation, over the images, of their activations at successive steps. Evenly spaced ranks
are taken: the least changing, the median, the most changing neuron. "Texture to structure" is
tested as a falling spectral centroid: `spearman_mean` is the mean over neurons of Spearman's
correlation of centroid and step. Its null, and that of the mean centroid of a step, shuffles the
steps of each neuron (2,000 times). An image that does not excite its neuron more than the best real
image is left out: where GELU is flat only total variation acts, and smooths. `--site mlp_pre`
maximises the neuron before GELU, which is never flat. An untrained model (timm:NAME@random) is a
second null. In a stacked ViT, f is another neuron in each block.

Cost: `n_copies` forwards and backwards up to the step, per iteration and image; at width 128 and 65
tokens 0.06 s on one core, so 14 minutes for 3 neurons x 12 steps x 400 iterations. Images are
written as they are finished, and a run that was stopped continues. Expected: in the paper edges and
textures at early steps, composite patterns at late ones; it prints no number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from bvit_interp import metrics
from bvit_interp.analyses.features import COLUMNS, TREND_COLUMNS, Config
from bvit_interp.analyses.features.maximise import maximise_in_chunks
from bvit_interp.analyses.features.neurons import NeuronActivations
from bvit_interp.analyses.features.profiles import ResponseProfiles, responses, select_neurons
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.top_images import TopImages
from bvit_interp.models.layout import layout_of
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model
from bvit_interp.probes.probe import Probe
from bvit_interp.results import Table, file_stem, rank_and_world, replacing

Tensors = dict[str, Tensor]


@for_any_model
def measure(
    models: Mapping[str, Model],
    data: Samples,
    config: Config,
    folder: Path | None = None,
    table: Table | None = None,
) -> pd.DataFrame:
    """Optimised images of every model, neuron and step, and the real images beside them.

    Parameters
    ----------
    models : name -> model; all models see each real image in one pass.
    data : images; their labels are not used.
    folder : folder for the images; without it none are stored.
    table : its rows are not made again; finished rows are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    geometries = {name: Geometry.of(model, data, config.resize) for name, model in models.items()}
    for name, geometry in geometries.items():
        if len(geometry.mean) != 3:
            raise UserError(f"{name}: images are optimised in three colours, the model takes grey")
    activations = {
        name: NeuronActivations(model, geometries[name].mean, geometries[name].std)
        for name, model in models.items()
    }
    steps = {name: _steps(name, activations[name], config) for name in models}
    top_images, profiles = _real_images(models, data, config)
    neurons = {name: _neurons(name, profiles[name], config) for name in models}
    rows: list[dict[str, Any]] = []
    for name in models:
        keys = [
            {"model": name, "neuron": neuron, "step": step}
            for neuron in neurons[name]
            for step in steps[name]
        ]
        for key, image, numbers in _optimise(
            activations[name], _unfinished(keys, table, config.chunk_size), config
        ):
            if table is not None and table.has(**key):
                continue
            of_neuron = {
                part: values[key["step"] - 1, key["neuron"]]
                for part, values in top_images[name].items()
            }
            seen = of_neuron["images"][of_neuron["images"] >= 0].tolist()
            path = _path(key, folder)
            if path is not None:
                _write_picture(path, image, seen, data, geometries[name])
            row = {
                **key,
                **numbers,
                **_beside_real(numbers["activation"], of_neuron["values"][0].item()),
                **dict.fromkeys(TREND_COLUMNS, math.nan),
                "correlation_distance": profiles[name]["correlation_distance"][
                    key["neuron"]
                ].item(),
                **_listed(of_neuron, layout_of(activations[name].model).grid),
                "n": int(profiles[name]["count"]),
                "iterations": config.iterations,
                "path": None if path is None else str(path),
            }
            rows.append(row)
            if table is not None:
                table.append(row)
    frame = pd.DataFrame(rows if table is None else table.rows)
    return _with_trends(frame, config.seed)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The whole table."""
    return frame


def _steps(name: str, activations: NeuronActivations, config: Config) -> list[int]:
    """The steps of the options, counted from 1; refuses steps and neurons that do not exist."""
    try:
        for neuron in config.neurons if config.neurons != "auto" else ():
            activations.check(int(neuron), 1)
        steps = config.steps or range(1, activations.num_steps + 1)
        return list(dict.fromkeys(activations.check(0, step) for step in steps))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _neurons(name: str, profiles: Tensors, config: Config) -> list[int]:
    """The neurons of the options, or those that auto selects."""
    if config.neurons != "auto":
        return list(dict.fromkeys(int(neuron) for neuron in config.neurons))
    try:
        return select_neurons(profiles, config.n_neurons)
    except UserError as error:
        raise UserError(f"{name}: {error}; name some with --neurons, or give more images") from None


def _real_images(
    models: Mapping[str, Model], data: Samples, config: Config
) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """`TopImages` and `ResponseProfiles` of every model, in one pass over the real images."""
    probes = {name: Probe(model) for name, model in models.items()}
    top_images: dict[str, TopImages] = {}
    profiles: dict[str, ResponseProfiles] = {}
    for name, probe in probes.items():
        steps, neurons, device = probe.num_steps, probe.num_neurons, device_of(probe.model)
        top_images[name] = TopImages(steps, neurons, config.n_top).to(device)
        profiles[name] = ResponseProfiles(steps, neurons).to(device)

    def respond(batch: ModelBatch) -> tuple[Tensor, Tensor, Tensor]:
        return batch.index, *responses(probes[batch.model], batch.images)

    for name, (index, means, peaks) in stream(models, data, config, respond, progress="features"):
        top_images[name].update(means, peaks, index)
        profiles[name].update(means)
    return (
        {name: metric.compute() for name, metric in top_images.items()},
        {name: metric.compute() for name, metric in profiles.items()},
    )


def _unfinished(
    keys: list[dict[str, Any]], table: Table | None, chunk_size: int
) -> list[dict[str, Any]]:
    """The keys of all chunks that are not whole in the table.

    A started chunk is optimised again as a whole: an image depends, by rounding, on the size of its
    batch, and a run that goes on gives the images of one that was not stopped.
    """
    chunks = [keys[first : first + chunk_size] for first in range(0, len(keys), chunk_size)]
    return [
        key
        for chunk in chunks
        if table is None or not all(table.has(**each) for each in chunk)
        for key in chunk
    ]


def _optimise(
    activations: NeuronActivations, keys: list[dict[str, Any]], config: Config
) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, float]]]:
    """For each key in order the image ``(3, height, width)`` in 0..1, and its numbers."""
    neurons, steps = (
        torch.tensor([key[part] for key in keys], dtype=torch.int64) for part in ("neuron", "step")
    )
    title = f"features {keys[0]['model']}" if keys else ""
    for chunk, start, images in maximise_in_chunks(
        activations, neurons, steps, config, config.chunk_size, title
    ):
        with torch.no_grad():
            reached, at_start = (
                activations(shown, neurons[chunk], steps[chunk]).tolist()
                for shown in (images, start.expand_as(images))
            )
        centroids = metrics.spectral_centroid(images).tolist()
        start_centroid = metrics.spectral_centroid(start).item()
        for i, key in enumerate(keys[chunk]):
            numbers = {
                "activation": reached[i],
                "start_activation": at_start[i],
                "spectral_centroid": centroids[i],
                "start_spectral_centroid": start_centroid,
            }
            yield key, images[i], numbers


def _beside_real(activation: float, real: float) -> dict[str, float]:
    """How an activation compares with the largest one among the real images."""
    return {
        "real_activation": real,
        "activation_ratio": activation / real if real > 0 else math.nan,
        "exceeds_real": int(activation > real),
    }


def _listed(of_neuron: Tensors, grid: tuple[int, int]) -> dict[str, str]:
    """The columns with the top-k images of a neuron and step, and with the grid of patches."""
    entries = zip(of_neuron["images"].tolist(), of_neuron["patches"].tolist(), strict=True)
    listed = [
        f"{image}:{patch // grid[1]},{patch % grid[1]}" for image, patch in entries if image >= 0
    ]
    return {"top_images": " ".join(listed), "patch_grid": f"{grid[0]}x{grid[1]}"}


def _path(key: Mapping[str, Any], folder: Path | None) -> Path | None:
    if folder is None:
        return None
    name = file_stem(key["model"])
    return folder / "features" / f"{name}_neuron{key['neuron']}_step{key['step']}.png"


def _write_picture(
    path: Path, image: Tensor, seen: list[int], data: Samples, geometry: Geometry
) -> None:
    """A PNG of the image and, right of it, of the real images; the first process writes it."""
    if rank_and_world()[0] != 0:
        return
    optimised = (255 * image.clamp(0, 1)).round().byte().movedim(0, -1)
    real = [geometry.to_pixels(geometry(data.read(i)[0])[0]) for i in seen]
    strip = torch.cat([optimised, *real], dim=1).numpy()
    with replacing(path) as temporary:
        Image.fromarray(strip).save(temporary, format="PNG")


def _with_trends(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The table with its `TREND_COLUMNS`."""
    parts = [
        part.assign(**_trend_columns(part, seed)) for _, part in frame.groupby("model", sort=False)
    ]
    return pd.concat(parts).loc[frame.index]


def _trend_columns(part: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Trends of the centroid of one model, over the images that exceed the real ones."""
    counted = part["spectral_centroid"].where(part["exceeds_real"] > 0)
    by_neuron = part.assign(spectral_centroid=counted).pivot(
        index="neuron", columns="step", values="spectral_centroid"
    )
    centroids = by_neuron.to_numpy()
    shuffled = metrics.shuffled_rows(centroids, seed)  # (draws, neurons, steps)
    spearman = metrics.rank_trend(centroids)
    low, high = metrics.interval(metrics.mean_over_images(metrics.rank_trend(shuffled).T))
    null_of_step = {
        step: metrics.interval(metrics.mean_over_images(shuffled[:, :, i].T))
        for i, step in enumerate(by_neuron.columns)
    }
    return {
        "spearman": part["neuron"].map(dict(zip(by_neuron.index, spearman, strict=True))),
        "spearman_mean": float(metrics.mean_over_images(spearman)),
        "spearman_null_low": low,
        "spearman_null_high": high,
        "centroid_null_low": [null_of_step[step][0] for step in part["step"]],
        "centroid_null_high": [null_of_step[step][1] for step in part["step"]],
    }
