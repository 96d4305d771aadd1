"""Which pictures excite the same neuron at every step, and do they turn from texture to structure?

Fig. 3, section 4.2.1 of bViT (arXiv 2605.10661): for a neuron f of the FFN and a step t, the image that maximises the
mean of `mlp_post` over the patches (CLS and registers left out) at that step. The paper says no more than
"optimization based visualization"; method and defaults are those of Ghiasi et al. (2022,
arXiv 2212.06727), see `probes.maximise`. All images start alike and see the same augmentations.

Ours: `--neurons auto` chooses among the neurons that answer at every step (spread over the real images above a tenth
of the step's median). They are ranked by `change`, 1 - the mean correlation, over the images, of their answers at
successive steps, and taken at even quantiles of it: the steadiest, the median, the most changing. "Texture to
structure" is tested as a falling spectral centroid: `trend` is the mean over neurons of Spearman's correlation of
centroid and step; its null, and that of the mean centroid of a step, shuffles the steps of each neuron (2,000 times).
Pictures that excite their neuron no more than the best real image have found nothing and are left out of that: where
GELU is flat only total variation acts, and smooths. `--site mlp_pre` maximises the neuron before GELU, which is never
flat. An untrained model (timm:NAME@random) is a second null. Of a stacked ViT, f is another neuron in each block.

Cost: `copies` forwards and backwards up to the step, an iteration and pair; at width 128 and 65 tokens 0.06 s on one
core, so 14 minutes for 3 neurons x 12 steps x 400 iterations. Pairs are written as they finish, and continued with.
Expected: in the paper edges and textures at early steps, composite patterns at late ones; no number is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.maximise import Neurons, Recipe
    from bvit_interp.results import Table


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the feature pictures; those of the optimisation are Ghiasi's by default."""

    neurons: tuple[int, ...] | Literal["auto"] = "auto"
    """Neurons of the FFN, from 0; auto chooses from the steadiest to the most changing."""
    count: int = 3
    """How many neurons auto chooses."""
    steps: tuple[int, ...] | None = None
    """Steps, from 1; by default all."""
    iterations: int = 400
    """Iterations of Adam; the learning rate falls to 0 along a cosine."""
    lr: float = 0.1
    """Learning rate at the start, in units of an image in 0..1."""
    copies: int = 8
    """Augmented copies an iteration."""
    noise: Literal["channel", "pixel"] = "channel"
    """Noise of one number a copy and channel, as in Ghiasi's code, or one a pixel."""
    jitter: int | None = None
    """Largest shift, pixels; by default 32 at 224 px and in proportion."""
    weight: float = 1 / 8
    """Weight of the activation; Ghiasi's code amounts to 1/8."""
    tv: float = 0.1
    """Weight v of total variation, in units of 5e-4; Ghiasi use 0.1 and 1."""
    site: Literal["mlp_post", "mlp_pre"] = "mlp_post"
    """What is maximised: the neuron, as Ghiasi, or the same before GELU."""
    image: Literal["pixel", "fourier"] = "pixel"
    """Optimise pixels, or lucent's decorrelated spectrum (needs torch-lucent)."""
    top: int = 3
    """Real images kept a neuron and step."""
    chunk: int = 12
    """Images optimised at once; halved by itself where they do not fit on the GPU."""
    seed: int = 0
    """Of the start image, the augmentations and the shuffles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("count", "top", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        self._recipe()  # refuses what is out of range
        if self.neurons != "auto" and not self.neurons:
            raise UserError("no neuron chosen; neurons: auto, or numbers from 0")

    def _recipe(self) -> Recipe:
        from bvit_interp.probes.maximise import Recipe

        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})

    def identity(self) -> dict[str, Any]:
        """Without what pictures do not depend on: a table may be continued with more neurons and steps."""
        free = ("neurons", "count", "steps", "chunk")
        return {key: value for key, value in super().identity().items() if key not in free}


COLUMNS = {
    "model": "checkpoint",
    "neuron": "neuron f of the FFN, from 0; of a stacked ViT another one in each block",
    "step": "step t, from 1",
    "activation": "of the optimised image: mean of mlp_post over the patches, without augmentation",
    "start": "the same of the image the optimisation starts from",
    "real": "the same of the real image where it is largest",
    "ratio": "activation / real; none where no real image has a positive one",
    "found": "1 if activation > real; else 0, and the centroid is left out of rho, trend and band",
    "centroid": "spectral centroid of the optimised image, cycles a pixel",
    "centroid_start": "null: that of the start image",
    "rho": "Spearman's correlation of centroid and step of this neuron, -1..1; below 0 the centroid falls",
    "trend": "mean of it over the model's neurons",
    "trend_low": "null: lower end of the 95 % interval of the trend, the steps of each neuron shuffled",
    "trend_high": "upper end of it",
    "band_low": "null: the same of the neurons' mean centroid at the step",
    "band_high": "upper end of it",
    "change": "1 - mean correlation over the real images of the neuron's answers at successive steps, 0..2",
    "top": "real images of the largest means, IMAGE:ROW,COLUMN: number in the data set, patch of the largest value",
    "grid": "patches of an image, ROWSxCOLUMNS",
    "n": "real images",
    "iterations": "iterations of the optimisation",
    "path": "PNG: the optimised image and, right of it, those of `top`",
}


def measure(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, folder: Path | None = None,
    table: Table | None = None,
) -> pd.DataFrame:  # fmt: skip
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
    import pandas as pd

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.probes.maximise import Neurons

    geometries = {name: Geometry.of(model, data, config.resize) for name, model in models.items()}
    neurons_of = {name: Neurons(model, geometries[name].mean, geometries[name].std) for name, model in models.items()}
    steps = {name: _steps(name, of, config) for name, of in neurons_of.items()}
    tops, profiles = _watch(models, data, config)
    chosen = {name: _chosen(name, profile, config) for name, profile in profiles.items()}
    rows: list[dict[str, Any]] = []
    for name, of in neurons_of.items():
        pairs = [{"model": name, "neuron": neuron, "step": step} for neuron in chosen[name] for step in steps[name]]
        lacking = [pair for pair in pairs if table is None or not table.has(**pair)]
        for pair, image, numbers in _make(of, lacking, config):
            neuron, step = pair["neuron"], pair["step"]
            best = {key: values[step - 1, neuron] for key, values in tops[name].items()}
            real, grid = best["values"][0].item(), of.model.patch_embed.grid_size
            rows.append({
                **pair, **numbers, "real": real, "ratio": numbers["activation"] / real if real > 0 else math.nan,
                "found": int(numbers["activation"] > real), **dict.fromkeys(_OF_ALL, math.nan),
                "change": profiles[name]["change"][neuron].item(),
                "top": _listed(best, grid), "grid": f"{grid[0]}x{grid[1]}", "n": int(profiles[name]["count"]),
                "iterations": config.iterations,
                "path": _keep(pair, image, best["images"], data, geometries[name], folder),
            })  # fmt: skip
            if table is not None:
                table.append(rows[-1])
    frame = pd.DataFrame(rows if table is None else table.rows)
    return _with_trend(frame, config)[list(COLUMNS)]


def _steps(name: str, of: Neurons, config: Config) -> list[int]:
    """The steps asked for, counted from 1; refuses steps and neurons that the model has not."""
    try:
        for neuron in config.neurons if config.neurons != "auto" else ():
            of.check(int(neuron), 1)
        return list(dict.fromkeys(of.check(0, step) for step in config.steps or range(1, of.num_steps + 1)))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _watch(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """What `TopList` and `StepProfiles` say of every model's neurons, in one pass over the real images."""
    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.probe import Probe
    from bvit_interp.probes.profiles import StepProfiles, answers
    from bvit_interp.probes.toplist import TopList

    probes = {name: Probe(model) for name, model in models.items()}
    tops, profiles = dict[str, TopList](), dict[str, StepProfiles]()
    for name, probe in probes.items():
        size, device = (probe.num_steps, probe.num_neurons), next(probe.model.parameters()).device
        tops[name], profiles[name] = TopList(*size, config.top).to(device), StepProfiles(*size).to(device)
    loader, geometries = config.loader(data, models, "features")
    for batch in loader:
        for name, probe in probes.items():
            parts = run_in_halves(
                lambda part, p=probe, g=geometries[name]: (part.index, *answers(p, part.views[g][0])), batch
            )
            for index, means, patches in parts:
                tops[name].update(means, patches, index)
                profiles[name].update(means)
    return {name: top.compute() for name, top in tops.items()}, {name: p.compute() for name, p in profiles.items()}


def _chosen(name: str, profile: Mapping[str, Tensor], config: Config) -> list[int]:
    """The neurons asked for, or those that auto means."""
    from bvit_interp.probes.profiles import from_steady_to_changing

    if config.neurons != "auto":
        return list(dict.fromkeys(int(neuron) for neuron in config.neurons))
    try:
        return from_steady_to_changing(profile, config.count)
    except UserError as error:
        raise UserError(f"{name}: {error}; name some with --neurons, or give more images") from None


def _make(
    of: Neurons, pairs: list[dict[str, Any]], config: Config
) -> Iterator[tuple[dict[str, Any], np.ndarray, dict[str, float]]]:
    """The pairs in order, each with its picture ``(3, height, width)`` in 0..1 and the picture's numbers."""
    import torch

    from bvit_interp.metrics import spectral_centroid
    from bvit_interp.probes.maximise import maximise_in_chunks

    neurons, steps = (torch.tensor([pair[key] for pair in pairs]) for key in ("neuron", "step"))
    title = f"features {pairs[0]['model']}" if pairs else ""
    for part, start, images in maximise_in_chunks(of, neurons, steps, config._recipe(), config.chunk, title):
        with torch.no_grad():
            reached, begun = (
                of(these, neurons[part], steps[part]).tolist() for these in (images, start.expand_as(images))
            )
        centroids, null = spectral_centroid(images).tolist(), spectral_centroid(start).item()
        for i, pair in enumerate(pairs[part]):
            yield pair, images[i].numpy(), {
                "activation": reached[i], "start": begun[i], "centroid": centroids[i], "centroid_start": null
            }  # fmt: skip


def _listed(best: Mapping[str, Tensor], grid: tuple[int, int]) -> str:
    """The column `top` of a neuron and step."""
    places = zip(best["images"].tolist(), best["patches"].tolist(), strict=True)
    return " ".join(f"{image}:{patch // grid[1]},{patch % grid[1]}" for image, patch in places if image >= 0)


def _keep(
    pair: Mapping[str, Any], image: np.ndarray, best: Tensor, data: Samples, geometry: Geometry, folder: Path | None
) -> str | None:
    """The PNG of a picture and of the images `best`, written by the first process."""
    if folder is None:
        return None
    import numpy as np
    from PIL import Image

    from bvit_interp.results import rank_and_world, replacing

    name = pair["model"].replace("/", "_").replace("@", "_")
    path = folder / "features" / f"{name}_neuron{pair['neuron']}_step{pair['step']}.png"
    if rank_and_world()[0] == 0:
        plain = replace(geometry, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        real = [plain(data.read(i)[0])[0].numpy() for i in best.tolist() if i >= 0]
        strip = np.concatenate([image, *real], axis=2).clip(0, 1).transpose(1, 2, 0)
        with replacing(path) as temporary:
            Image.fromarray((255 * strip).round().astype(np.uint8)).save(temporary, format="PNG")
    return str(path)


_OF_ALL = ("rho", "trend", "trend_low", "trend_high", "band_low", "band_high")  # filled when all pictures are there


def _with_trend(frame: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The table with the trends of the centroid, of the pictures that count, and their nulls."""
    from bvit_interp import metrics

    for _, part in frame.groupby("model", sort=False):
        counted = part.assign(centroid=part["centroid"].where(part["found"] > 0))
        centroids = counted.pivot(index="neuron", columns="step", values="centroid")
        shuffled = metrics.shuffled_rows(centroids.to_numpy(), config.seed)
        rho, draws = metrics.rank_trend(centroids.to_numpy()), metrics.rank_trend(shuffled)
        low, high = metrics.interval(metrics.mean_over_images(draws.T))
        bands = [metrics.interval(metrics.mean_over_images(at_step.T)) for at_step in shuffled.transpose(2, 0, 1)]
        of_step = dict(zip(centroids.columns, bands, strict=True))
        frame.loc[part.index, "rho"] = part["neuron"].map(dict(zip(centroids.index, rho, strict=True)))
        for key, value in (("trend", float(metrics.mean_over_images(rho))), ("trend_low", low), ("trend_high", high)):
            frame.loc[part.index, key] = value
        frame.loc[part.index, ["band_low", "band_high"]] = [of_step[step] for step in part["step"]]
    return frame


# ---- figure --------------------------------------------------------------------------------------------


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 3: a row of pictures a neuron, a column a step, best real images beneath; then the centroids per step."""
    from matplotlib.figure import Figure

    models = list(frame.sort_values("step", kind="stable").groupby("model", sort=False))
    columns = max(part["step"].nunique() for _, part in models)
    heights = [0.35 + 2 * 0.98 * part["neuron"].nunique() for _, part in models]
    figure = Figure(figsize=(max(0.86 * columns + 1.1, 4.2 * len(models)), sum(heights) + 3.0), layout="constrained")
    panels = figure.subfigures(len(models) + 1, 1, height_ratios=[*heights, 3.0], squeeze=False)[:, 0]
    for panel, (name, part) in zip(panels, models, strict=False):
        _plot_pictures(panel, name, part, columns)
    _plot_centroids(panels[-1], models)
    return figure


def _plot_pictures(panel: SubFigure, name: str, part: pd.DataFrame, columns: int) -> None:
    """Optimised image over best real image, activation under each; models of fewer steps leave columns empty."""
    steps, neurons = sorted(part["step"].unique()), list(dict.fromkeys(part["neuron"]))
    axes = panel.subplots(2 * len(neurons), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax in axes[:, len(steps) :].flat:
        ax.set_axis_off()
    rows = {(row.neuron, row.step): row for row in part.itertuples()}
    for i, neuron in enumerate(neurons):
        change = part.loc[part["neuron"] == neuron, "change"].iloc[0]
        axes[2 * i, 0].set_ylabel(f"neuron {neuron}\nchange {change:.2f}", fontsize=7)
        axes[2 * i + 1, 0].set_ylabel("best real", fontsize=7, color="0.4")
        for j, step in enumerate(steps):
            _plot_pair(axes[2 * i, j], axes[2 * i + 1, j], rows.get((neuron, step)))
    for ax, step in zip(axes[0], steps, strict=False):
        ax.set_title(f"step {step}", fontsize=8)
    panel.suptitle(name, fontsize=10)


def _plot_pair(above: Axes, below: Axes, row: Any) -> None:
    """The pictures of one row of the table; a grey field where their file is missing."""
    import numpy as np
    from matplotlib.image import imread
    from matplotlib.patches import Rectangle

    if row is None:
        above.set_axis_off()
        below.set_axis_off()
        return
    reached = f"{row.activation:.2f}" if row.found else f"({row.activation:.2f})"
    above.set_xlabel(reached, fontsize=7, labelpad=2, color="black" if row.found else "0.6")
    below.set_xlabel(f"{row.real:.2f}", fontsize=7, labelpad=2, color="0.4")
    if not isinstance(row.path, str) or not Path(row.path).is_file():
        for ax in (above, below):
            ax.set_facecolor("0.93")
            ax.text(0.5, 0.5, "no file", transform=ax.transAxes, ha="center", va="center", fontsize=6, color="0.4")
        return
    best = row.top.split()
    pictures = np.split(imread(row.path), 1 + len(best), axis=1)
    above.imshow(pictures[0])
    below.imshow(pictures[1])
    (height, width), (rows, columns) = pictures[1].shape[:2], map(int, row.grid.split("x"))
    r, c = map(int, best[0].partition(":")[2].split(","))
    corner = (c * width / columns - 0.5, r * height / rows - 0.5)
    below.add_patch(Rectangle(corner, width / columns, height / rows, fill=False, edgecolor="white", linewidth=1))


def _plot_centroids(panel: SubFigure, models: list[tuple[Any, pd.DataFrame]]) -> None:
    """Centroid per step of every neuron, their mean, and the nulls."""
    from bvit_interp import plotting

    axes = panel.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for ax, (name, part) in zip(axes, models, strict=True):
        first, counted = part.iloc[0], part.assign(centroid=part["centroid"].where(part["found"] > 0))
        for i, (neuron, of_neuron) in enumerate(counted.groupby("neuron", sort=False)):
            style = plotting.line_style(i) | {"linewidth": 0.9, "markersize": 3}
            ax.plot(of_neuron["step"], of_neuron["centroid"], **style, label=f"neuron {neuron}")
        means = counted.groupby("step")[["centroid", "band_low", "band_high"]].mean()
        ax.plot(means.index, means["centroid"], color="black", linewidth=2, label="mean")
        ax.fill_between(means.index, means["band_low"], means["band_high"], color="0.85", label="mean, steps shuffled")
        ax.axhline(first["centroid_start"], **plotting.NULL, linestyle=":", label="start image")
        ax.set_title(
            f"{name}: trend {first['trend']:+.2f}, shuffled {first['trend_low']:+.2f} to {first['trend_high']:+.2f}",
            fontsize=9,
        )
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(bottom=0)
        ax.set_xlim(part["step"].min() - 0.5, part["step"].max() + 0.5)  # also where nothing counts
        plotting.step_axis(ax, part["step"])
        plotting.legend(ax)  # each model has neurons of its own
    axes[0].set_ylabel("spectral centroid, cycles/pixel")
