"""What does each neuron and head answer to at every step: when is it born, does it die, does it change its role?

Ours; not in bViT (arXiv 2605.10661), whose Fig. 3 shows pictures of a few neurons. A unit's answer to an image is, of a
neuron, the mean of `mlp_post` over the patches, of a head the mean norm of `z` over them; its profile at a step the
mean answer to each class. `selectivity` is the share of the answer's variance over images that lies between classes,
eta^2, debiased: 0 on average where labels are permuted. A unit is alive at a step whose selectivity is at least
`threshold` and beyond chance by the F test (0.05, Bonferroni over all units and steps); `birth` and `death` are its
first and last such step. `role_change` is 1 - the correlation of the profiles of successive steps, `stability` that of
any two, over steps alive. `share_class`, `share_step` and `share_interaction` divide the variance of a unit's table of
class means, classes x steps, and sum to 1. `reliability` correlates the profiles of two random halves of the images.
Formulas and sources are in `probes/lives.py`.

Nulls: images in random groups in place of classes (selectivity, units alive, shares), the next unit's profile in place
of a unit's own (roles, reliability), other units of the kind, drawn at random (ablation). Chosen units are ablated at
one step, or at all, to their mean at each token, and told in full: class means, top images, effect on accuracy and on
the logit of the true class; the report has a page for each. A unit of a stacked ViT is another one in each block, tied
to its namesakes by nothing but a number: its roles show what a shared block must beat.

Cost: a forward an image, and V (T + 3) / 2 of each of the `ablated` for V ablated units, up to 14 by default. Two
models of width 128, 1000 images of 32 px, 200 of them ablated: 316 s of one core's time. By the number of forwards, not
measured, all of ImageNet's are a pass and 10,000 images more; its sums take 0.9 GB a bViT-B.
Expected: unknown before; if neurons of a shared block keep their meaning, their roles change less than a stack's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.biographies import Biographies, Effects
    from bvit_interp.probes.lives import Lives

_UNIT = re.compile(r"(mlp_post|z):\d+", re.ASCII)
_KINDS = ("neuron", "head")
_LISTS = {"birth": True, "death": False, "role_change": True, "stability": True}
"""Unit statistics from which units are chosen, and whether the largest comes first."""


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the biographies."""

    units: tuple[str, ...] = ()
    """Units to tell in full, as mlp_post:374 (a neuron) or z:2 (a head); by default the first of the ranked lists."""
    count: int = 1
    """Units taken from each list and kind: latest birth, earliest death, largest role change, largest stability."""
    threshold: float = 0.1
    """Least selectivity of a unit that is alive, 0..1."""
    lifetime: int = 3
    """Units alive at fewer steps are in no ranked list."""
    top: int = 3
    """Images kept a unit and step: those of the largest answers."""
    profile: int = 10
    """Classes of a chosen unit's profile in the table: those whose means vary most; the .npz has all."""
    ablated: int = 100
    """Images on which units are ablated, spread evenly over those used."""
    zero: bool = False
    """Ablate a unit to zero, not to its mean over the images at that step and token."""
    nulls: int = 3
    """Other units of each kind ablated for comparison, drawn at random."""
    seed: int = 0
    """Of the halves and groups of images, and of the units drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("count", "lifetime", "top", "profile", "ablated", "nulls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold must be 0 or more and below 1, got {self.threshold}")
        for unit in self.units:
            if not _UNIT.fullmatch(unit):
                raise UserError(f"units must be as mlp_post:374 (a neuron) or z:2 (a head), got {unit!r}")
        if len({(site, int(unit)) for site, unit in (each.split(":") for each in self.units)}) < len(self.units):
            raise UserError(f"a unit is given twice: {', '.join(self.units)}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Means over a model's neurons, and the first two of each ranked list."""
        means = frame["unit"].isna() & frame["step"].isna()
        listed = frame["statistic"].isin(_LISTS) & (frame["rank"] <= 2)
        kept = frame[(means | listed) & (frame["kind"] == "neuron")]
        return kept[["model", "statistic", "unit", "value", "low", "high", "null", "n", "rank"]]


COLUMNS = {
    "model": "checkpoint",
    "kind": "neuron (mlp_post) or head (z); of accuracy the model",
    "unit": "number of the unit, from 0; none for a number of all units of the kind",
    "step": "step t, from 1; none for a number of all steps, and for ablation at every step",
    "statistic": "of all units: selectivity, birth, death, lifetime (steps alive), role_change, role_change_ends (of"
    " the first and last step alive), stability, share_class, share_step, share_interaction, reliability; of chosen"
    " units also firing (share of patches where a neuron is above 0), class_mean, top (largest answer),"
    " ablation_accuracy and ablation_logit (change of the true class's logit, less the mean logit); without a unit: the"
    " mean of a statistic over units, alive (share of units), and accuracy of the model on the images of the ablation",
    "class": "of selectivity the class of the largest mean; of class_mean the class",
    "value": "the statistic: steps of birth, death and lifetime; 1 - r, 0..2, of role changes; r, -1..1, of stability"
    " and reliability; logits of ablation_logit; activations of class_mean and top; else a share, 0..1",
    "low": "lower end of a 95 % interval: over images of selectivity, firing and ablation (normal) and accuracy"
    " (Wilson), over units of alive (Wilson) and means (bootstrap); none for the others",
    "high": "upper end of it",
    "null": "null: of selectivity, alive and shares, random groups of images in place of classes; of roles and"
    " reliability, the next unit's profile; of ablation, other units; of class_mean the mean over classes; none for the"
    " others",
    "n": "images; for means over units, and alive, units",
    "rank": "place in the list of units by birth (the latest first), death (the earliest), role_change or stability"
    " (the largest), of those alive at `lifetime` steps or more",
    "top": "real images of the largest answers, IMAGE:ROW,COLUMN: number in the data set, patch where it is strongest",
    "path": "of top: PNG of these images, a row a step, the patch framed; of means: .npz of all units' class means and"
    " firing",
}  # fmt: skip


def measure(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, folder: Path | None = None
) -> pd.DataFrame:
    """Lives of every unit of every model.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images, of the models' classes.
    folder : where the top images and the .npz go; without it none are kept.

    Returns
    -------
    A table of `COLUMNS`.
    """
    import pandas as pd

    from bvit_interp.data.geometry import Geometry
    from bvit_interp.probes.biographies import ablate_all, drawn, named, watch_all
    from bvit_interp.probes.lives import Lives

    given = {name: named(name, model, config.units) for name, model in models.items()}
    seen = watch_all(models, data, config, config.top, config.seed)
    lives = {
        name: {kind: Lives.of(sums.compute(), config.threshold) for kind, sums in of.profiles.items()}
        for name, of in seen.items()
    }
    chosen = {
        name: given[name]
        or [(kind, unit) for kind in _KINDS for unit in of[kind].first_of(_LISTS, config.count, config.lifetime)]
        for name, of in lives.items()
    }
    others = {name: drawn(of.probe, config.nulls, config.seed) for name, of in seen.items()}
    ablated = {name: list(dict.fromkeys(chosen[name] + others[name])) for name in models}
    fewer = replace(config, limit=min(config.ablated, config.limit or config.ablated))
    effects = ablate_all(seen, ablated, models, data, fewer, config.zero)
    frames = []
    for name, kinds in lives.items():
        folders = None if folder is None else (folder, name.replace("/", "_").replace("@", "_"))
        parts = [part for kind, of in kinds.items() for part in _of_kind(kind, of, data, config)]
        path = _arrays(kinds, seen[name], data, folders)
        parts = [part.assign(path=path) if part["unit"].isna().all() else part for part in parts]
        geometry = Geometry.of(models[name], data, config.resize)
        for kind, unit in chosen[name]:
            parts += _of_unit(kind, unit, kinds[kind], seen[name], data, config)
            parts.append(_top(kind, unit, seen[name], data, geometry, folders))
        parts += _of_effects(effects[name], chosen[name], ablated[name], others[name])
        frames.append(pd.concat(parts).assign(model=name))
    frame = pd.concat(frames, ignore_index=True).reindex(columns=list(COLUMNS))
    numbers = ["value", "low", "high", "null"]
    frame[numbers] = frame[numbers].astype(float).round(7)  # float32 gives no more, and the file is half as long
    return frame.astype({"unit": "Int64", "step": "Int64", "rank": "Int64", "n": "Int64"})


def _rows(statistic: str, kind: str, unit: Any, step: Any, **columns: Any) -> pd.DataFrame:
    """Rows of a statistic; columns are numbers, lists or tensors."""
    import pandas as pd

    listed = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in columns.items()}
    rows = max((len(each) for each in (unit, step, *listed.values()) if isinstance(each, (list, range))), default=1)
    about = {"statistic": statistic, "kind": kind, "unit": unit, "step": step}
    return pd.DataFrame(about | listed, index=range(rows))


def _of_kind(kind: str, of: Lives, data: Samples, config: Config) -> Iterator[pd.DataFrame]:
    """Selectivity and ranked statistics of all units of a kind, and their means."""
    import numpy as np

    from bvit_interp.metrics import bootstrap_means, interval, wilson_interval

    found, units = of.selectivity, range(of.alive.shape[1])
    low, high = found.interval()
    names = [data.classes[i] for i in of.classes.tolist()]
    for t, value in enumerate(found.value):
        most = [names[i] for i in of.means[:, t].argmax(0).tolist()]
        about = {"low": low[t], "high": high[t], "null": of.random.value[t], "n": found.images, "class": most}
        yield _rows("selectivity", kind, units, t + 1, value=value, **about)
    alive, null = of.alive.double().mean(1), of.random.alive(config.threshold).double().mean(1)
    ends = np.array([wilson_interval(share * len(units), len(units)) for share in alive.tolist()])
    about = {"low": ends[:, 0], "high": ends[:, 1], "null": null, "n": len(units)}
    yield _rows("alive", kind, None, range(1, len(alive) + 1), value=alive, **about)
    for key, columns in of.statistics.items():
        part = _rows(key, kind, units, None, **columns, n=found.images)
        if key in _LISTS:
            listed = of.order(key, _LISTS[key], config.lifetime).tolist()
            part["rank"] = part["unit"].map({unit: place for place, unit in enumerate(listed, start=1)})
        yield part
        there = part[part["value"].notna()]
        below, above = interval(bootstrap_means(there[["value"]].to_numpy(float))[:, 0])
        about = {"low": below, "high": above, "null": there["null"].mean() if "null" in there else math.nan}
        yield _rows(key, kind, None, None, value=there["value"].mean(), n=len(there), **about)


def _of_unit(
    kind: str, unit: int, of: Lives, seen: Biographies, data: Samples, config: Config
) -> Iterator[pd.DataFrame]:
    """Class means of a chosen unit, of the classes whose means vary most, and a neuron's firing."""
    means = of.means[:, :, unit]
    null, steps = means.mean(0), range(1, means.shape[1] + 1)
    spread = (means - null).square().sum(1).argsort(descending=True, stable=True)[: config.profile]
    for c in spread.sort().values.tolist():
        about = {"class": data.classes[int(of.classes[c])], "null": null}
        yield _rows("class_mean", kind, unit, steps, value=means[c], **about)
    if kind == "neuron":
        yield _rows("firing", kind, unit, steps, **{key: x[:, unit] for key, x in seen.firing.compute().items()})


def _arrays(
    kinds: Mapping[str, Lives], seen: Biographies, data: Samples, folders: tuple[Path, str] | None
) -> str | None:
    """The .npz of what the table has of chosen units only, written by the first process."""
    import numpy as np

    from bvit_interp.results import rank_and_world, replacing

    if folders is None:
        return None
    arrays = {f"{kind}_class_means": of.means.float().numpy() for kind, of in kinds.items()}
    arrays["neuron_firing"] = seen.firing.compute()["value"].float().numpy()
    arrays["classes"] = np.array([data.classes[i] for i in kinds["neuron"].classes.tolist()])
    path = folders[0] / f"biography_{folders[1]}.npz"
    if rank_and_world()[0] == 0:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    return str(path)


def _top(
    kind: str, unit: int, seen: Biographies, data: Samples, geometry: Geometry, folders: tuple[Path, str] | None
) -> pd.DataFrame:
    """The images of a unit's largest answers at every step, and a PNG of them, a row a step."""
    from PIL import Image

    from bvit_interp.probes.biographies import sheet
    from bvit_interp.results import rank_and_world, replacing

    found = {key: of[:, unit].cpu() for key, of in seen.top[kind].compute().items()}
    grid, images, patches, path = seen.probe.grid, found["images"].tolist(), found["patches"].tolist(), None
    listed = [
        " ".join(f"{i}:{p // grid[1]},{p % grid[1]}" for i, p in zip(*step, strict=True) if i >= 0)
        for step in zip(images, patches, strict=True)
    ]
    if folders is not None:
        path = folders[0] / "biography" / f"{folders[1]}_{kind}{unit}.png"
        if rank_and_world()[0] == 0:
            with replacing(path) as temporary:
                Image.fromarray(sheet(images, patches, grid, data, geometry)).save(temporary, format="PNG")
    about = {"value": found["values"][:, 0], "top": listed, "path": path and str(path)}
    return _rows("top", kind, unit, range(1, len(images) + 1), **about)


def _of_effects(
    of: Effects, chosen: list[tuple[str, int]], ablated: list[tuple[str, int]], others: list[tuple[str, int]]
) -> Iterator[pd.DataFrame]:
    """What ablating each chosen unit does at each step and at all, beside the other units of its kind."""
    from bvit_interp.metrics import wilson_interval

    found, hits = of.change.compute(), of.hits.compute()
    steps = [*range(1, of.probe.num_steps + 1), None]
    for i, statistic in enumerate(("ablation_accuracy", "ablation_logit")):
        for kind, unit in chosen:
            null = [ablated.index(other) for other in others if other[0] == kind and other != (kind, unit)]
            columns = {key: values[i, :, ablated.index((kind, unit))] for key, values in found.items()}
            yield _rows(statistic, kind, unit, steps, **columns, null=found["value"][i][:, null].mean(1))
    n = int(hits["n"])
    low, high = wilson_interval(float(hits["value"]) * n, n)
    yield _rows("accuracy", "model", None, None, value=float(hits["value"]), low=low, high=high, n=n)


# ---- figure --------------------------------------------------------------------------------------------

_WORDS = {"birth": "born last", "death": "dies first", "role_change": "changes most", "stability": "stablest"}


def plot(frame: pd.DataFrame) -> Figure:
    """Neurons only: selectivity of all, who lives when, how roles change, how reliable profiles are; chosen lives."""
    from bvit_interp import plotting

    whole = frame.astype({"unit": "Int64", "step": "Int64"})
    models = list(whole[whole["kind"] == "neuron"].groupby("model", sort=False))
    figure, axes = plotting.canvas(columns=3, rows=2, width=4.6, height=3.6)
    _raster(figure, axes[0, 0], models)
    _alive(axes[0, 1], models)
    _spread(axes[0, 2], models, "role_change_ends", "role_change")
    axes[0, 2].set_title("role change, first to last step alive (thin: successive)", fontsize=10)
    axes[0, 2].set_xlabel("1 - r of the profiles")
    _spread(axes[1, 0], models, "reliability")
    axes[1, 0].set_title("reliability of the profile, all neurons", fontsize=10)
    axes[1, 0].set_xlabel("r of two halves of the images")
    name, first = models[0]
    chosen = list(dict.fromkeys(first.loc[first["statistic"] == "class_mean", "unit"]))[: len(_LISTS)]
    led = first[first["rank"] == 1].set_index("statistic")["unit"]
    said = {unit: [f"neuron {unit}", *(_WORDS[key] for key in _LISTS if led.get(key) == unit)] for unit in chosen}
    labels = {unit: ", ".join(words) for unit, words in said.items()}
    _chosen_lives(axes[1, 1], first[first["statistic"] == "selectivity"], labels)
    _chosen_lives(axes[1, 2], first[(first["statistic"] == "ablation_logit") & first["step"].notna()], labels)
    axes[1, 1].set_title(f"selectivity of chosen neurons, {name}", fontsize=10)
    axes[1, 2].set_title("ablated at one step: true logit", fontsize=10)
    axes[1, 1].axhline(0, **plotting.NULL, linestyle="--", label="permuted labels")
    for ax in axes.flat[1:]:
        plotting.legend(ax)
    return figure


def _raster(figure: Figure, ax: Axes, models: list[tuple[Any, pd.DataFrame]]) -> None:
    """Selectivity of every neuron at every step, by birth and then death, models side by side."""
    import pandas as pd

    ax.grid(visible=False)
    shown, start = list[pd.DataFrame](), 0
    ticks: dict[int, str] = {}
    for name, part in models[:3]:
        of = part[part["unit"].notna()]
        table = of[of["statistic"] == "selectivity"].pivot(index="unit", columns="step", values="value")
        life = of[of["statistic"].isin(("birth", "death"))].pivot(index="unit", columns="statistic", values="value")
        order = life.assign(peak=-table.max(axis=1)).sort_values(["birth", "death", "peak"]).index
        shown += [table.loc[order].reset_index(drop=True), pd.DataFrame({"gap": [float("nan")]})]
        ticks |= {start + t - 1: str(t) for t in table.columns if t % 4 == 0 or t in (1, len(table.columns))}
        ax.text(start + (len(table.columns) - 1) / 2, -0.01 * len(table), name, ha="center", va="bottom", fontsize=7)
        start += len(table.columns) + 1
    matrix = pd.concat(shown[:-1], axis=1).to_numpy(float)
    image = ax.imshow(matrix, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set(xlabel="step", ylabel="neurons, by birth and death")
    ax.set_title("selectivity of every neuron\n", fontsize=10)
    figure.colorbar(image, ax=ax, label="debiased $\\eta^2$", shrink=0.9)


def _alive(ax: Axes, models: list[tuple[Any, pd.DataFrame]]) -> None:
    """Share of neurons alive at each step, and as bars those born, and below zero those that died after it."""
    from bvit_interp import plotting

    for i, (name, part) in enumerate(models):
        style = plotting.line_style(i)
        alive = part[part["statistic"] == "alive"]
        ax.plot(alive["step"], alive["value"], **style, label=name)
        ax.fill_between(alive["step"], alive["low"], alive["high"], color=style["color"], alpha=0.2, linewidth=0)
        ax.plot(alive["step"], alive["null"], **plotting.NULL, label=None if i else "alive by random groups")
        for key, sign in (("birth", 1), ("death", -1)):
            steps = part.loc[(part["statistic"] == key) & part["unit"].notna(), "value"].dropna()
            counts = steps[(steps < alive["step"].max()) | (sign > 0)].value_counts() * sign / alive["n"].iloc[0]
            place = counts.index + 0.3 * (i - (len(models) - 1) / 2)
            ax.bar(place, counts, width=0.3, color=style["color"], alpha=0.6)
    plotting.step_axis(ax, models[0][1]["step"].dropna())
    ax.set_ylabel("share of neurons")
    ax.set_title("alive (bars: born, and below 0 last alive)", fontsize=10)


def _spread(ax: Axes, models: list[tuple[Any, pd.DataFrame]], key: str, thin: str | None = None) -> None:
    """How a statistic is spread over a model's neurons, as cumulative shares, and its null; another as thin lines."""
    from bvit_interp import plotting

    for i, (name, part) in enumerate(models):
        plain = plotting.line_style(i) | {"marker": ""}
        lines = ((thin, "value", {"linewidth": 0.8}), (key, "null", plotting.NULL), (key, "value", {"label": name}))
        for statistic, column, look in lines:
            values = part.loc[(part["statistic"] == statistic) & part["unit"].notna(), column].dropna().sort_values()
            shares = [(place + 1) / len(values) for place in range(len(values))]
            ax.plot(values, shares, **{**plain, **look})  # type: ignore[dict-item]
    ax.plot([], [], **plotting.NULL, label="null: next neuron's")
    ax.set(ylabel="share of neurons", ylim=(0, 1.02))


def _chosen_lives(ax: Axes, frame: pd.DataFrame, labels: Mapping[int, str]) -> None:
    from bvit_interp import plotting

    for i, (unit, label) in enumerate(labels.items()):
        part, style = frame[frame["unit"] == unit], plotting.line_style(i)
        ax.plot(part["step"], part["value"], **style, label=label)
        ax.fill_between(part["step"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)
        if part["statistic"].iloc[0] != "selectivity":
            ax.plot(part["step"], part["null"], **plotting.NULL, label=None if i else "other neurons")
    plotting.step_axis(ax, frame["step"])
