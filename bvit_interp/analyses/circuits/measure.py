"""Which heads and neurons does each step need, and would one circuit do for all steps?

Ours; not in bViT (arXiv 2605.10661), whose section 4.2.3 asks it of weights pruned in training. A gate for every (step,
head) and (step, group of neighbouring neurons) of the trained model is open, or closes its unit by ablation. Of heads
and of groups alike a `fraction` of all T U gates stays open, whatever a unit costs; at which steps is free. Gates are
chosen on `fit_images` drawn at random and judged on others, by ``KL(whole model || gated model)`` and accuracy:

- `gradient`: by the mean over images of ``|d log p(own answer) / d gate|`` (Michel et al., 2019; attribution patching);
- `learned`: trained for ``KL`` by straight-through gradients, exactly that many open (`probes/circuit.py`).

Conditions, all with as many open gates of each kind: `per-step`, the circuit; `all-steps`, the same units at every
step; `even`, as many at each step as these, but its own best; `shuffled`, the circuit of another step at each step;
`shuffled-units`, each step's own number of units, but those that another step ranks first. Nulls are random units:
`random`, each step's own number; `even-random`, as many at every step; `same-random`, the same at every step. So how
many units a step needs (`shuffled`, `even` against `per-step`) is told from which (`shuffled-units`, `random` against
`per-step`; `even-random` against `even`; `same-random` against `all-steps`). `excess` is KL above the circuit's on the
same images; its interval is over images, `kl_least` and `kl_most` are over draws. Steps of a stack have weights of
their own, head 0 of two steps is no more alike than heads 0 and 1: there `shuffled-units` and `all-steps` mean nothing,
and so between the blocks of a hybrid. With a memory, gates are in a step's own block; its inner updates stay whole.

Beside it, per step: the share of its gates that stay open (null: open gates lie anywhere), and the Jaccard overlap with
other steps' circuits (null: random gates, as many at each step). The fit runs on every process, on the same images.

Cost: `draws` * 5 + 4 forwards an image, method and fraction, 56 by default: 128 images of 32 px, a bViT of width 128
and its ViT, 86 s on one core (AMD EPYC). Computed, not measured: 1000 images of bViT-B are 1.6 PFLOPs, three minutes of
a GPU at 10 TFLOP/s. Learning takes 8 * `epochs` + 2 forwards a fit image and fraction more.
Expected: early steps need nearly all units, late ones few; which ones stay open matters less than how many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from bvit_interp.data.reading import Reading
from bvit_interp.errors import DataError, UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.data.loader import Batch
    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.circuit import Fit, Gates
    from bvit_interp.results import Table

_FIT_BATCH = 32
_IMAGES_AT_ONCE = 256
_NULL_DRAWS = 200
_KEYS = ("model", "method", "fraction", "condition", "kind", "step")
_LABELS = {
    "per-step": "circuit of each step", "even": "as many at every step, own units",
    "all-steps": "same units at every step", "shuffled": "circuit of another step",
    "shuffled-units": "own number, another step's units", "random": "null: own number, random units",
    "even-random": "null: as many at every step, random", "same-random": "null: same random units at every step",
}  # fmt: skip
_NULLS = {"random": "-", "even-random": "--", "same-random": ":"}
Method = Literal["gradient", "learned"]


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the circuits; `limit` is of the images judged on."""

    fractions: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2)
    """Shares of the gates that stay open, between 0 and 1."""
    methods: tuple[Method, ...] = ("gradient",)
    """How gates are chosen: gradient, learned, or both."""
    groups: int = 32
    """Groups of neighbouring neurons at a step, each with one gate."""
    ablation: Literal["mean", "zero"] = "mean"
    """What a closed unit gives: its mean over the fit images, token by token, or zero."""
    fit_images: int = 128
    """Images that means, gradients and learning are over, kept in memory; of those that `limit` leaves out as far as
    there are, at most half of the set, and not judged on."""
    epochs: int = 4
    """Passes over them in which gates are learned."""
    draws: int = 2
    """Orders of the steps, and random circuits."""
    seed: int = 0
    """Of the fit images, the orders and the random circuits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or not all(0 < fraction < 1 for fraction in self.fractions):
            raise UserError(f"fractions must be between 0 and 1, got {self.fractions}")
        if not self.methods or set(self.methods) - set(get_args(Method)) or len(set(self.methods)) < len(self.methods):
            allowed = ", ".join(get_args(Method))
            raise UserError(f"methods must be one or more of {allowed}, each once, got {', '.join(self.methods)!r}")
        if self.ablation not in ("mean", "zero"):
            raise UserError(f"ablation must be mean or zero, got {self.ablation!r}")
        for name in ("groups", "fit_images", "epochs", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be >= 1, got {getattr(self, name)}")

    def identity(self) -> dict[str, Any]:
        """Without what a sweep may be continued with more of."""
        return {key: value for key, value in super().identity().items() if key not in ("fractions", "methods")}

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """KL by condition, and what shuffling adds to it."""
        of_models = frame[(frame["step"] == "all") & (frame["condition"] != "full")]
        keys = ["model", "method", "fraction"]
        kl = of_models.pivot(index=keys, columns="condition", values="kl")[list(_LABELS)]
        shuffled = of_models[of_models["condition"] == "shuffled"].set_index(keys)
        added = shuffled[["excess", "excess_low", "excess_high"]].rename(columns=lambda key: f"shuffled_{key}")
        return kl.join(added).reindex(shuffled.index).reset_index()


COLUMNS = {
    "model": "checkpoint",
    "method": "how gates are chosen: gradient or learned; none for the whole model",
    "fraction": "share of the gates of each kind that stay open, 0..1",
    "condition": "full, per-step, even, all-steps, shuffled, shuffled-units, random, even-random or same-random",
    "kind": "head or neuron: gates of a step; all for the rows of a whole condition",
    "step": "step t whose gates the row is about; all for the rows of a whole condition",
    "kl": "mean KL(whole model || gated model) over images and draws, nats",
    "kl_low": "lower end of its normal 95 % interval over images",
    "kl_high": "upper end of it",
    "kl_least": "the least mean KL of a draw",
    "kl_most": "the largest of a draw",
    "excess": "mean of KL less the per-step circuit's, image by image, nats; none for that",
    "excess_low": "lower end of its normal 95 % interval over images",
    "excess_high": "upper end of it",
    "accuracy": "share of images classified right, mean over draws, 0..1",
    "low": "lower end of its normal 95 % interval over images",
    "high": "upper end of it",
    "agreement": "share of images with the whole model's answer, mean over draws, 0..1",
    "chance": "null: share of the most frequent class among the images, 0..1",
    "kept": "share of the step's gates that are open, 0..1",
    "kept_null_low": "null: lower end of the 95 % range of it if the open gates lay anywhere",
    "kept_null_high": "upper end of it",
    "overlap": "mean Jaccard overlap of the step's open gates with each other step's, 0..1",
    "overlap_null": "null: mean of the same over random gates, as many at each step",
    "overlap_null_low": "lower end of its 95 % range",
    "overlap_null_high": "upper end of it",
    "gates": "the step's gates in order, # open and . closed",
    "n": "images judged on; of a step, images the gates are chosen on",
}


def measure(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, table: Table | None = None
) -> pd.DataFrame:
    """Circuits of every model, by every method and of every size.

    Parameters
    ----------
    models : name -> model; all see each image in one pass a method and fraction.
    data : labelled images, at least two; labels are used for the accuracy alone.
    table : rows already there are not measured again; finished ones are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    import pandas as pd

    from bvit_interp.data.labels import label_map
    from bvit_interp.probes.circuit import Gates, conditions

    classes = {name: label_map(data, model) for name, model in models.items()}
    gates = {name: Gates(model, config.groups) for name, model in models.items()}
    places = _fit_places(data, config)
    fits: dict[str, Fit] = {}
    rows: list[dict[str, Any]] = [] if table is None else table.rows
    for row in rows:
        row["step"] = str(row["step"])
    for method, fraction in itertools.product(config.methods, sorted(set(config.fractions), reverse=True)):
        unit = {"method": method, "fraction": fraction}
        last = {name: {"kind": "neuron", "step": str(of.steps)} for name, of in gates.items()}
        chosen = [name for name in models if table is None or not table.has(model=name, **unit, **last[name])]
        if not chosen:
            continue
        fits = fits or _fits(models, gates, data, places, config)
        masks = {
            name: conditions(fits[name], method, fraction, config.epochs, config.draws, config.seed) for name in chosen
        }
        judged = _judge({name: models[name] for name in chosen}, gates, masks, classes, data, places, config)
        for name in chosen:
            for found in _rows(judged[name], masks[name], fits[name], config):
                row = {**dict.fromkeys(COLUMNS, math.nan), "model": name, **unit, **found}
                known = [tuple(other[key] for key in _KEYS) for other in rows]  # a killed run may have written some
                if tuple(row[key] for key in _KEYS) not in known:
                    rows.append(row) if table is None else table.append(row)
    return pd.DataFrame(rows)[list(COLUMNS)]


def _fit_places(data: Samples, config: Config) -> list[int]:
    """Places of the fit images, at random: of those that `limit` leaves out, and of the others once these are used."""
    import numpy as np

    from bvit_interp.data.samples import spread

    if len(data) < 2:
        raise UserError(f"gates are chosen on some images and judged on others: at least 2 are needed, got {len(data)}")
    scored = set(spread(len(data), config.limit))
    drawn = np.random.default_rng(config.seed).permutation(len(data)).tolist()
    return sorted(drawn, key=scored.__contains__)[: min(config.fit_images, len(data) // 2)]


def _fits(
    models: Mapping[str, VisionTransformer], gates: Mapping[str, Gates], data: Samples, places: Sequence[int],
    config: Config,
) -> dict[str, Fit]:  # fmt: skip
    """What each model does on the fit images, on every process."""
    from bvit_interp.data.geometry import Geometry
    from bvit_interp.probes.circuit import Fit

    geometries = {name: Geometry.of(model, data, config.resize) for name, model in models.items()}
    batches = _batches(data, places, set(geometries.values()), config)
    return {name: Fit(gates[name], batches, geometries[name], config.ablation == "mean") for name in models}


def _batches(data: Samples, places: Iterable[int], geometries: Iterable[Geometry], config: Config) -> list[Batch]:
    """The fit images in batches that depend on no option; their index counts the images that can be read."""
    import torch

    from bvit_interp.data.loader import Batch

    views, names, labels = {geometry: list[Any]() for geometry in geometries}, [], []
    for place in places:
        try:
            image, label, _ = data.read(place)
        except DataError:
            if not config.skip_corrupt:
                raise
            continue
        names.append(data.name(place))
        labels.append(label)
        for geometry, images in views.items():
            images.append(geometry(image, None)[0])
    if not names:
        raise DataError("none of the images that gates are chosen on can be read")
    whole = {geometry: torch.stack(images) for geometry, images in views.items()}
    return [
        Batch(
            index, torch.tensor(labels)[index], {geometry: (images[index], None) for geometry, images in whole.items()},
            [names[i] for i in index],
        )
        for index in torch.arange(len(names)).split(_FIT_BATCH)
    ]  # fmt: skip


def _judge(
    models: Mapping[str, VisionTransformer], gates: Mapping[str, Gates], masks: Mapping[str, Mapping[str, Tensor]],
    classes: Mapping[str, Tensor], data: Samples, fit: Sequence[int], config: Config,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """How each model answers under its gates, in one pass over the images that are not among the places `fit`."""
    import torch

    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.circuit import Judged

    judged = {
        name: Judged(model.num_classes, [len(of) for of in masks[name].values()], gates[name].device)
        for name, model in models.items()
    }
    loader, geometries = config.loader(data, models, "circuits")
    for batch in loader:
        for name, of_model in judged.items():

            def run(part: Batch, of: Gates = gates[name], name: str = name) -> tuple[Tensor, Tensor, Tensor] | None:
                other = ~torch.isin(part.index, torch.tensor(fit))
                images = part.views[geometries[name]][0][other].to(of.device)
                if not len(images):
                    return None
                keep = torch.cat([*masks[name].values()]).to(images)
                with torch.inference_mode():
                    gated = [of.logits(images, some) for some in keep.split(max(1, _IMAGES_AT_ONCE // len(images)))]
                    return of.probe(images), torch.cat(gated), classes[name][part.labels[other]].to(images.device)

            for answers in filter(None, run_in_halves(run, batch)):
                of_model.update(*answers)
    return {name: of_model.compute() for name, of_model in judged.items()}


def _rows(found: Mapping[str, Any], masks: Mapping[str, Tensor], fit: Fit, config: Config) -> Iterator[dict[str, Any]]:
    """The rows of one model at one method and fraction: the whole model, the conditions, the steps."""
    from bvit_interp.metrics import wilson_interval
    from bvit_interp.probes.circuit import structure

    whole = found["whole"]
    of_all = {"kind": "all", "step": "all", "n": whole["n"], "chance": whole["chance"]}
    low, high = wilson_interval(whole["top1"] * whole["n"], whole["n"])
    yield {
        **of_all, "method": "none", "fraction": 1.0, "condition": "full", "kl": 0.0, "accuracy": whole["top1"],
        "low": low, "high": high, "agreement": 1.0,
    }  # fmt: skip
    for i, condition in enumerate(masks):
        kl, excess, accuracy = (
            {key: float(values[i]) for key, values in found[what].items()} for what in ("kl", "excess", "accuracy")
        )
        row = {
            **of_all, "condition": condition, "kl": kl["value"], "kl_low": kl["low"], "kl_high": kl["high"],
            "kl_least": float(found["kl_least"][i]), "kl_most": float(found["kl_most"][i]),
            "accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"],
            "agreement": float(found["agreement"]["value"][i]),
        }  # fmt: skip
        of_others = {"excess": excess["value"], "excess_low": excess["low"], "excess_high": excess["high"]}
        yield row | (of_others if i else {})
    for kind, units in fit.gates.kinds.items():
        own = masks["per-step"][0][:, units]
        columns = {key: values.tolist() for key, values in structure(own, _NULL_DRAWS, config.seed).items()}
        for t, gates in enumerate(own.tolist()):
            yield {
                "condition": "per-step", "kind": kind, "step": str(t + 1), "n": fit.count,
                **{key: values[t] for key, values in columns.items()}, "gates": "".join(".#"[each] for each in gates),
            }  # fmt: skip


def plot(frame: pd.DataFrame) -> Figure:
    """KL against size by condition, a panel a model, and accuracy; below, the gates at one size, and their overlap."""
    from bvit_interp import plotting

    methods = [name for name in get_args(Method) if name in set(frame["method"])]
    models, effects = list(dict.fromkeys(frame["model"])), frame[frame["step"] == "all"]
    figure, axes = plotting.canvas(len(models) + 1, 2, width=4.6, height=3.6)
    size = sorted(set(frame["fraction"]) - {1.0})[(frame["fraction"].nunique() - 1) // 2]
    steps = frame[(frame["kind"] != "all") & (frame["method"] == methods[-1]) & (frame["fraction"] == size)]
    for (top, below), name in zip(axes.T, models, strict=False):
        _draw_conditions(top, effects[(effects["model"] == name) & (effects["method"] == methods[-1])])
        top.set_title(f"{name}: {methods[-1]} gates", fontsize=10)
        _draw_gates(below, steps[steps["model"] == name])
        below.set_title(f"open gates, {size:.0%} of each kind", fontsize=10)
    _draw_accuracy(axes[0, -1], effects, methods)
    _draw_overlap(axes[1, -1], steps[steps["kind"] == "neuron"], models)
    lines = {"loc": "outside upper center", "ncols": 4, "frameon": False, "fontsize": 8}
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **lines)
    return figure


def _draw_conditions(ax: Axes, frame: pd.DataFrame) -> None:
    from bvit_interp import plotting

    for i, (condition, label) in enumerate(_LABELS.items()):
        part, style = frame[frame["condition"] == condition].sort_values("fraction"), plotting.line_style(i)
        style = plotting.NULL | {"linestyle": _NULLS[condition]} if condition in _NULLS else style
        ax.plot(part["fraction"], part["kl"], **style, label=label)
        ax.fill_between(part["fraction"], part["kl_low"], part["kl_high"], color=style["color"], alpha=0.2, linewidth=0)
    ax.set(xlabel="share of gates open", ylabel="KL to the whole model, nats", ylim=(0, None))
    ax.set_xticks(sorted(set(frame["fraction"])))


def _draw_gates(ax: Axes, frame: pd.DataFrame) -> None:
    """A raster of steps by units: open gates dark, heads before the groups of neurons."""
    import numpy as np

    from bvit_interp import plotting

    head, neuron = (
        np.array([[each == "#" for each in gates] for gates in part["gates"]]) for _, part in frame.groupby("kind")
    )
    raster, heads = np.concatenate([head, neuron], axis=1), head.shape[1]
    ax.grid(visible=False)
    ax.imshow(raster.T, aspect="auto", cmap="Greys", vmax=1.4, interpolation="nearest")
    ax.axhline(heads - 0.5, color=plotting.COLOURS[1], linewidth=1.5)
    ax.set(xticks=range(len(raster)), xticklabels=range(1, len(raster) + 1), xlabel="step")
    middles = [(heads - 1) / 2, (heads + raster.shape[1] - 1) / 2]
    ax.set_yticks(middles, ["heads", "neuron groups"], rotation=90, va="center", fontsize=8)


def _draw_accuracy(ax: Axes, effects: pd.DataFrame, methods: Sequence[str]) -> None:
    from bvit_interp import plotting

    circuits = effects[effects["condition"].isin(("per-step", "full"))]
    for (i, (name, of_model)), method in itertools.product(enumerate(circuits.groupby("model", sort=False)), methods):
        is_last = method == methods[-1]
        part = of_model[of_model["method"].isin((method, "none"))].sort_values("fraction")
        style = plotting.line_style(i) | ({} if is_last else {"markerfacecolor": "white"})
        ax.plot(part["fraction"], part["accuracy"], **style, label=name if is_last else None)
        ax.fill_between(part["fraction"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)
    ax.axhline(effects["chance"].iloc[0], **plotting.NULL)
    ax.annotate("null: most frequent class", (1, effects["chance"].iloc[0] - 0.01), ha="right", va="top", fontsize=8)
    ax.set(xlabel="share of gates open", ylabel="accuracy", ylim=(0, 1))
    ax.set_title(f"accuracy of the circuits{' (hollow: gradient)' * (len(methods) - 1)}", fontsize=10)
    plotting.legend(ax)


def _draw_overlap(ax: Axes, frame: pd.DataFrame, models: Sequence[str]) -> None:
    from bvit_interp import plotting

    for i, name in enumerate(models):
        part, style = frame[frame["model"] == name], plotting.line_style(i)
        steps = part["step"].astype(int)
        ax.plot(steps, part["overlap"], **style, label=name)
        null = style | plotting.NULL | {"marker": "", "label": None if i else "null: random gates"}
        ax.plot(steps, part["overlap_null"], **null)
        ax.fill_between(steps, part["overlap_null_low"], part["overlap_null_high"], color="0.5", alpha=0.2, linewidth=0)
    ax.set(ylabel="mean Jaccard overlap", ylim=(0, 1))
    ax.set_title("neuron groups shared with other steps", fontsize=10)
    plotting.step_axis(ax, frame["step"].astype(int))
    plotting.legend(ax)
