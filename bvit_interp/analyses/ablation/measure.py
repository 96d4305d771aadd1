"""Which heads and neurons does the answer need, and at which step does it need them?

Ours; not in bViT (arXiv 2605.10661), which ablates no unit. A unit, one head (`z`) or one of `groups` runs of
neighbouring neurons (`mlp_post`), is replaced at all tokens by zero (Michel et al., 2019), by its mean over images at
that step and token, or by what it is on another image (`resample`; Chan et al., 2022). `statistic` says at which steps:

- `each`: at step t alone; `from`: at every step from t on; `all`: at every step;
- `sum`: the sum over t of the changes by `each`; `excess`: `all` less `sum`, 0 if single steps add up to all of them.

`value` is the change of what `answer` names, ablated less clean, mean over images of differences within an image:
`accuracy`, the true class's `logit` and its log-probability `log_prob` (which no shift of all logits changes); `kl` is
KL(clean || ablated). `null` of a head is the same with as many random channels of `z`, drawn from all heads, the same
at every step: what any ablation of that width does. Groups of neurons are arbitrary: theirs is the mean over groups.

Which units matter when, of the table of `each` over steps and units, by a two-way analysis of variance free of the
images' noise (products of different tenths of the images): the shares `variance_steps`, `variance_units` (the same
units at every step) and `variance_both` (which unit depends on the step). Their null shuffles the units within each
step, as if a head's number meant nothing from one step to the next: so it is in a stack, where head h of two blocks
shares its number alone. Large effects rule the shares; where the effects on images cancel (`accuracy`, `log_prob`) they
may be all noise, and their intervals then wide. `reliability` is the correlation between halves of the images of the
units' differences.

Runs start again from the clean state before the first ablated step. With a memory (bViT-fl, -sc) the step's own block
is ablated, its inner updates stay whole.

Cost: a unit and method take T (T + 1) / 2 applications of the block for `each` and one less than as many for `from`,
which has `all` in it: 155 for T = 12, 13 forwards; a forward for the means of each image, of which `images` are then
ablated. Of 1000 images of 32 px, 100 of them ablated, a bViT of width 128 with four heads takes 4 minutes on one core
(348 forwards an image ablated; scaled from 80 images). Computed from forwards, not measured: 8 minutes on two cores for
width 256 and eight heads; for bViT-B on ImageNet's 50,000 images 116,000 forwards, 5 minutes at 400 images a second.
Expected: no number is printed. Where a head is the same weights at every step, its main effect should be above the
null, in a stack at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.data.loader import Batch
    from bvit_interp.data.partners import Partners
    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.effects import Ablator

_Method = Literal["zero", "mean", "resample"]
_Scope = Literal["each", "from", "all"]
_BYTES_OF_DONORS = 2**30
_SUMMARIES = ("variance_steps", "variance_units", "variance_both", "reliability")


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the ablation."""

    images: int | None = 100
    """Images that are ablated, spread evenly over the data set, at most `limit`; the means are over all that are used.
    None for all of them."""
    methods: tuple[_Method, ...] = ("zero", "mean", "resample")
    """What a unit becomes: zero, its mean, or its activation on another image (resample)."""
    scopes: tuple[_Scope, ...] = ("each", "from", "all")
    """Steps at which a unit is ablated: each in turn, from each on, all."""
    groups: int = 4
    """Groups of neighbouring neurons; 0 for none."""
    seed: int = 0
    """Of the null's random channels and of the shuffles."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and self.images < 1:
            raise UserError(f"images must be >= 1, got {self.images}")
        for name, literal in (("methods", _Method), ("scopes", _Scope)):
            given, allowed = getattr(self, name), get_args(literal)
            if not given or set(given) - set(allowed) or len(set(given)) < len(given):
                words = f"{', '.join(allowed)}, each once, got {', '.join(given)!r}"
                raise UserError(f"{name} must be one or more of {words}")
        if self.groups < 0:
            raise UserError(f"groups must be >= 0, got {self.groups}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Of heads: how their KL parts, and each one's largest loss of log-probability."""
        heads = frame[frame["kind"] == "head"]
        scope = "each" if "each" in self.scopes else self.scopes[0]
        main = heads[
            (heads["method"] == _main(heads)) & (heads["answer"] == "log_prob") & (heads["statistic"] == scope)
        ]
        largest = main.sort_values("value", kind="stable").drop_duplicates(["model", "unit"])
        table = heads["statistic"].isin(_SUMMARIES) & (heads["answer"] == "kl")
        return heads[table | heads.index.isin(largest.index)].drop(columns="kind")


COLUMNS = {
    "model": "checkpoint",
    "method": "zero, mean or resample",
    "kind": "head or neurons",
    "statistic": "each, from, all, sum or excess of a unit; variance_steps, variance_units, variance_both or"
    " reliability of the table of each",
    "answer": "accuracy (share, change -1..1), logit (of the true class), log_prob (of it, nats) or kl (from the clean"
    " answer, nats)",
    "step": "the step ablated, or the first of them; none for all, sum, excess and the table's",
    "unit": "head or group of neurons, from 0; none for the table's",
    "value": "mean over images of the change; a share of variance (noise may leave it outside 0..1), a correlation",
    "low": "lower end of its 95 % interval over images: normal, of a share by the jackknife over tenths of the images",
    "high": "upper end of it",
    "null": "null: random channels of z, as many; neurons: mean over the groups; of the table: units shuffled within"
    " steps (variance_steps: steps within units)",
    "p_value": "of reliability: share of renumberings of the units, new in each tenth of the images, that give as much",
    "n": "images ablated",
}


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """What ablating every unit of every model does.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    import pandas as pd
    import torch

    from bvit_interp.data.labels import label_map
    from bvit_interp.data.partners import Partners
    from bvit_interp.data.samples import spread
    from bvit_interp.probes.effects import Ablator

    classes = {name: label_map(data, model) for name, model in models.items()}
    ablators = {name: Ablator(model, config.groups, config.seed) for name, model in models.items()}
    ablated = replace(config, limit=min(x for x in (config.images, config.limit, len(data)) if x is not None))
    wants_others = "resample" in config.methods
    partners = Partners(data, ablated.limit, config.skip_corrupt) if wants_others else None
    place = {index: i for i, index in enumerate(spread(len(data), ablated.limit))}
    tallies = {name: _Tally(ablator, config) for name, ablator in ablators.items()}
    if "mean" in config.methods:
        _take_means(models, ablators, data, config)
    loader, geometries = ablated.loader(data, models, "ablation")
    for batch in loader:
        for name, ablator in ablators.items():
            for part in _parts(batch, ablator.donor_bytes() if partners else 0):
                with torch.inference_mode():
                    tallies[name].take(part, place, classes[name], geometries[name], partners)
    rows = [{"model": name, **row} for name, tally in tallies.items() for row in tally.rows()]
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS)).astype({"step": "Int64", "unit": "Int64"})


def _take_means(
    models: Mapping[str, VisionTransformer], ablators: Mapping[str, Ablator], data: Samples, config: Config
) -> None:
    """The mean activations that mean ablation fills in, in a pass of its own."""
    import torch

    from bvit_interp.data.loader import run_in_halves

    means = {name: ablator.site_means() for name, ablator in ablators.items()}
    loader, geometries = config.loader(data, models, "ablation: means")
    for batch in loader:
        for name, ablator in ablators.items():
            with torch.inference_mode():
                parts = run_in_halves(
                    lambda part, a=ablator, g=geometries[name]: (a.sums(part.views[g][0]), len(part)), batch
                )
            for sums, count in parts:
                for site, total in sums.items():
                    means[name][site].update(total, count)
    for name, ablator in ablators.items():
        ablator.means = {site: metric.compute() for site, metric in means[name].items()}


def _parts(batch: Batch, image_bytes: int) -> Iterator[Batch]:
    """The batch in parts whose donors' activations take at most 1 GiB."""
    if len(batch) > 1 and image_bytes * len(batch) > _BYTES_OF_DONORS:
        for half in batch.half():
            yield from _parts(half, image_bytes)
    else:
        yield batch


class _Tally:
    """The changes of one model's answers, while images stream by."""

    def __init__(self, ablator: Ablator, config: Config) -> None:
        from bvit_interp.probes.effects import ANSWERS, FOLDS
        from bvit_interp.probes.moments import Moments

        self.ablator, self.config, last = ablator, config, ablator.probe.num_steps
        steps = range(1, last + 1)
        of_scope = {"each": [(t, t) for t in steps], "from": [(t, last) for t in steps], "all": [(1, last)]}
        self.rows_of = [(scope, span) for scope in config.scopes for span in of_scope[scope]]
        self.spans = list(dict.fromkeys(span for _, span in self.rows_of))
        self.adds_up = {"each", "all"} <= set(config.scopes)
        self.kinds = [units.kind for units in ablator.units for _ in units.keep]
        shape = (len(config.methods), len(self.kinds), len(self.spans) + 2 * self.adds_up, len(ANSWERS))
        self.whole, self.folds = Moments(*shape).to(ablator.device), Moments(FOLDS, *shape).to(ablator.device)

    def take(
        self, batch: Batch, place: Mapping[int, int], classes: Tensor, geometry: Geometry, partners: Partners | None
    ) -> None:
        """Ablate every unit on the images of a batch."""
        import torch

        from bvit_interp.data.loader import run_in_halves
        from bvit_interp.probes.effects import FOLDS

        def run(part: Batch) -> tuple[Tensor, Tensor]:
            donors = partners(part.index, geometry)[0] if partners else None
            images, labels = part.views[geometry][0], classes[part.labels]
            return part.index, self.ablator.effects(images, labels, self.config.methods, self.spans, donors)

        for index, changes in run_in_halves(run, batch):
            if self.adds_up:
                changes = torch.cat([changes, *self._sums(changes)], dim=3)
            self.whole.update(changes)
            of_folds = changes.new_full((len(changes), FOLDS, *changes.shape[1:]), math.nan)
            half = max(len(place) // 2, 1)  # an image and its partner lie in one fold
            fold = [place[int(i)] % half % FOLDS for i in index]
            of_folds[range(len(fold)), fold] = changes
            self.folds.update(of_folds)

    def _sums(self, changes: Tensor) -> list[Tensor]:
        """Of changes ``(B, M, U, S, 4)`` the sum over single steps, and what all at once do beyond it."""
        last = self.ablator.probe.num_steps
        single = [self.spans.index((t, t)) for t in range(1, last + 1)]
        total = changes[:, :, :, single].sum(3, keepdim=True)
        return [total, changes[:, :, :, [self.spans.index((1, last))]] - total]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of every unit, then of the table of single steps."""
        from bvit_interp.probes.effects import ANSWERS

        listed: list[tuple[str, int | None, int]] = [
            (scope, None if scope == "all" else span[0], self.spans.index(span)) for scope, span in self.rows_of
        ]
        if self.adds_up:
            listed += [("sum", None, len(self.spans)), ("excess", None, len(self.spans) + 1)]
        whole = {key: values.numpy() for key, values in self.whole.compute().items()}
        folds = {key: values.numpy() for key, values in self.folds.compute().items()}
        for m, method in enumerate(self.config.methods):
            for kind in dict.fromkeys(kind for kind in self.kinds if kind != "null"):
                places = [i for i, each in enumerate(self.kinds) if each == kind]
                for a, answer in enumerate(ANSWERS):
                    keys = {"method": method, "kind": kind, "answer": answer}
                    for statistic, step, s in listed:
                        found = {key: values[m, :, s, a] for key, values in whole.items()}
                        null = found["value"][self.kinds.index("null") if kind == "head" else places].mean()
                        for unit, i in enumerate(places):
                            values = {key: column[i] for key, column in found.items()}
                            yield keys | {"statistic": statistic, "step": step, "unit": unit, "null": null} | values
                    if "each" in self.config.scopes:
                        yield from (keys | row for row in self._table(folds, m, places, a))

    def _table(self, folds: Mapping[str, np.ndarray], m: int, places: list[int], a: int) -> Iterator[dict[str, Any]]:
        """How the effects over steps and units part."""
        import numpy as np

        from bvit_interp.probes.effects import steps_and_units

        single = [self.spans.index((t, t)) for t in range(1, self.ablator.probe.num_steps + 1)]
        effects = folds["value"][:, m][:, places][:, :, single, a].swapaxes(1, 2)
        counts = folds["n"][:, m, 0, 0, a]
        found = steps_and_units(effects, counts, self.config.seed)
        for statistic, values in found.items():
            yield {"statistic": statistic, "n": int(np.sum(counts)), **values}


def _main(frame: pd.DataFrame) -> str:
    """The method that is drawn."""
    return "mean" if (frame["method"] == "mean").any() else str(frame["method"].iloc[0])


def plot(frame: pd.DataFrame) -> Figure:
    """Of one method, mean if it is there: the true class's log-probability at every step and unit of each model; the KL
    of its heads beside random channels; heads ablated from a step on; units at all steps beside their single steps.
    """
    from bvit_interp import plotting

    method = _main(frame)
    frame = frame[frame["method"] == method]
    units = frame["unit"].astype("Int64").astype(str)
    frame = frame.assign(name=frame["kind"].map({"head": "head ", "neurons": "group "}) + units)
    there, models = set(frame["statistic"]), list(dict.fromkeys(frame["model"]))
    panels: list[tuple[Any, str | None]] = []
    if "each" in there:
        panels += [(draw, name) for draw in (_draw_map, _draw_profiles) for name in models]
    panels += [(_draw_from, None)] * ("from" in there) + [(_draw_all, None)] * ("all" in there)
    columns = min(max(len(models), 2), len(panels))
    figure, axes = plotting.canvas(columns, math.ceil(len(panels) / columns), width=5.2, height=3.1)
    for ax, (draw, name) in zip(axes.flat, panels, strict=False):
        draw(figure, ax, frame, name)
        ax.title.set_fontsize(10)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(
        f"{method} ablation: change of the true class's log-probability, and KL from the clean answer", fontsize=11
    )
    return figure


def _draw_map(figure: Figure, ax: Axes, frame: pd.DataFrame, name: str) -> None:
    """Every unit at every single step; all models in the same colours."""
    from bvit_interp import plotting

    each = _rows(frame, "each", "log_prob")
    table = each[each["model"] == name].pivot(index="name", columns="step", values="value")
    table = table.loc[list(dict.fromkeys(each["name"][each["model"] == name]))]
    limits = (each["value"].min(), each["value"].max())
    steps = [int(step) for step in table.columns]
    plotting.heat_map(figure, ax, table.to_numpy(), steps, list(table.index), "nats", limits=limits)
    ax.set(xlabel="step ablated", title=f"{name}: log-probability, at one step")


def _draw_profiles(figure: Figure, ax: Axes, frame: pd.DataFrame, name: str) -> None:
    """KL of every head at every single step, with its interval, and of the random channels."""
    from bvit_interp import plotting

    each = _rows(frame, "each", "kl")
    each = each[each["kind"] == "head"]
    floor = 0.5 * each["value"].clip(lower=1e-9).min()  # an interval may reach below 0
    part = each[each["model"] == name]
    for i, (_, of_head) in enumerate(part.groupby("unit", sort=True)):
        style = plotting.line_style(i)
        ax.plot(of_head["step"], of_head["value"], **style, label=of_head["name"].iloc[0])
        low = of_head["low"].clip(lower=floor)
        ax.fill_between(of_head["step"], low, of_head["high"], color=style["color"], alpha=0.12, linewidth=0)
    ax.plot(of_head["step"], of_head["null"], **plotting.NULL, label="random channels, as many")
    ax.set(title=f"{name}: KL, a head at one step", ylabel="KL, nats", yscale="log")
    ax.set_ylim(floor, 2 * each[["value", "high"]].max().max())
    plotting.step_axis(ax, part["step"])
    plotting.legend(ax)


def _draw_from(figure: Figure, ax: Axes, frame: pd.DataFrame, name: None) -> None:
    """Every head ablated from a step on: a line a head in the colour of its model."""
    from bvit_interp import plotting

    part = _rows(frame, "from", "log_prob")
    part = part[part["kind"] == "head"]
    for i, (model, of_model) in enumerate(part.groupby("model", sort=False)):
        style = plotting.line_style(i) | {"linewidth": 1.0, "markersize": 3}
        shade = {"color": style["color"], "alpha": 0.1, "linewidth": 0}
        for unit, of_head in of_model.groupby("unit"):
            ax.plot(of_head["step"], of_head["value"], **style, label=None if unit else f"{model}: each head")
            ax.fill_between(of_head["step"], of_head["low"], of_head["high"], **shade)
        null = plotting.NULL | {"linestyle": style["linestyle"]}
        ax.plot(of_head["step"], of_head["null"], **null, label=f"{model}: random channels")
    ax.set(title="log-probability, a head from the step on", ylabel="nats")
    plotting.step_axis(ax, part["step"])
    plotting.legend(ax)


def _draw_all(figure: Figure, ax: Axes, frame: pd.DataFrame, name: None) -> None:
    """Every unit at all steps, and beside it, open, the sum of its single steps."""
    from bvit_interp import plotting

    units = list(dict.fromkeys(_rows(frame, "all", "log_prob")["name"]))
    for i, (model, of_model) in enumerate(frame.groupby("model", sort=False)):
        style = plotting.line_style(i) | {"linestyle": "", "markersize": 5}
        for statistic, shift, word in (("all", 0.0, "all steps"), ("sum", 0.12, "sum of single steps")):
            part = _rows(of_model, statistic, "log_prob")
            if not len(part):
                continue
            x = [units.index(unit) + 0.35 * i - 0.2 + shift for unit in part["name"]]
            face = {} if statistic == "all" else {"markerfacecolor": "white"}
            error = (part["value"] - part["low"], part["high"] - part["value"])
            ax.errorbar(x, part["value"], error, **style | face, label=f"{model}: {word}")
            ax.plot(x, part["null"], "_", **plotting.NULL, markersize=9, label=None if i or shift else "null")
    ax.set_xticks(range(len(units)), [f"{unit[0]}{unit.split()[1]}" for unit in units])
    ax.set(title="log-probability, a unit at all steps", ylabel="nats", xlabel="h: head, g: group of neurons")
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.6 * (high - low), high)  # room for the legend
    plotting.legend(ax)


def _rows(frame: pd.DataFrame, statistic: str, answer: str) -> pd.DataFrame:
    return frame[(frame["statistic"] == statistic) & (frame["answer"] == answer)]
