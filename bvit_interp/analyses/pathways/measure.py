"""Do the steps of a pruned bViT use weights of their own?

Figs. 5 and 14, Table 7, section 4.2.3 and Appendix G of bViT (arXiv 2605.10661), for models with one mask M_t a step
(`FOLDER@masked` of a run of `bvit-interp prune`). How many steps use a weight; the share of a step's weights that no
other step uses, ``S_t = 1 - |M_t and U| / |M_t|`` with U the union of the others (eq. 12, its exclusive reading); the
overlap of two steps (Jaccard, eq. 11), averaged by size; the sparsity of masks and of weights, ``1 - |union| / |W|``.

The nulls are ours (`probes/sharing.py`): independent masks as dense in every step and matrix. They grow exclusive too
when thinned out, ``S_t = prod_{s not t} (1 - q_s)``, 0.54 at the paper's 13th round: S_t alone tells nothing. An empty
mask has no S_t, two have no overlap (0 / 0, `--empty`); the paper draws 1.0. Mean overlaps come without them and as 1.

Ours as well: with `--swaps` each step runs on the masks of each other step, the rest on their own (does a pathway
belong to its step?); `shuffled` runs all masks in another order. `collapse`, after Routing the Lottery (arXiv
2601.22141, where a sharp rise of the overlap tells the drop in accuracy without labels), compares a model's mean
overlap with that of the next less sparse one of its run, and is flagged where it rises, as random masks' never does.

Cost: 1 + `shuffles` forwards an image and model, with `--swaps` and 12 steps 71.5 more; ten models of width 128 and 300
images of 32 px take 100 s on one core.
Expected: in the paper attention's projection is the most exclusive, the FFN shared but for step 1, and accuracy holds
to 98 % mask sparsity (above 0.85 at 94.5 %). The last row of its Table 7 (99.9 % of the masks, 98.2 % of the weights)
is arithmetically impossible: twelve masks of 0.124 % cover at most 1.49 % of the weights, not 1.8 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.samples import Samples
    from bvit_interp.models.masks import Masks
    from bvit_interp.probes.exchanges import Exchanges
    from bvit_interp.probes.sharing import Sharing

Empty = Literal["nan", "1", "0"]
ALL = "all"
PRUNED, COLLAPSE = "fully_pruned", "collapse"


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the pathways."""

    empty: Empty = "nan"
    """S_t of an empty mask and the overlap of two: nan (none, left out of means), 1 (as the paper draws it) or 0."""
    swaps: bool = False
    """Run every step on every other step's masks too: T (T - 1) runs, each from the step that is changed."""
    shuffles: int = 5
    """Random orders of the masks over the steps to run; 0 for none."""
    seed: int = 0
    """Of the orders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.empty not in get_args(Empty):
            raise UserError(f"empty must be one of {', '.join(get_args(Empty))}, got {self.empty!r}")
        if self.shuffles < 0:
            raise UserError(f"shuffles must be >= 0, got {self.shuffles}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """All components and steps together."""
        return frame[(frame["component"] == ALL) & frame["step"].isna()]


COLUMNS = {
    "model": "checkpoint",
    "sparsity": "mask-level sparsity of the model, 1 - mean over steps of |M_t| / |W|, 0..1",
    "statistic": "accuracy; shuffled (its mean with the masks in other orders); swapped (accuracy with the masks of"
    " other_step at step); mask_sparsity (of a step, or the mean over steps); weight_sparsity (share of weights in no"
    " mask) and weight_sparsity_layer_mean (mean of the four matrices', regardless of size); least_weight_sparsity"
    " (the least that masks of these sizes can have); mean_uses (mean number of steps using an active weight);"
    " utilisation (share of the union's weights that exactly `uses` steps use); specialization (S_t); jaccard (of two"
    " steps; of all matrices the mean by size); jaccard_mean (its mean over pairs); collapse (rise of jaccard_mean"
    " since the next less sparse model of the run)",
    "component": "qkv, proj, fc1, fc2, or all of them",
    "step": "step t, from 1; none for a number of all steps",
    "other_step": "the other step of a pair, or the one whose masks are used",
    "uses": "number of steps u that use a weight; of utilisation alone",
    "convention": "value given to 0 / 0: empty=nan, empty=1 or empty=0; of specialization and jaccard alone",
    "value": "the statistic, 0..1 (mean_uses: steps, 1..T; collapse: -1..1)",
    "null": "of masks: expected of independent masks of the same densities; of accuracies: share of the most frequent"
    " class among the images; none where there is nothing to expect",
    "low": "lower end of a 95 % interval: of masks that of the null (each weight drawn by itself), of accuracies"
    " Wilson's of the value; of shuffled the least accurate order",
    "high": "upper end of it; of shuffled the most accurate order",
    "n": "what the value is a share of: weights, or images",
    "flag": "fully_pruned: no weight is left (of both steps of a pair); collapse: the mean overlap rises beyond chance",
}


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """Sharing, sparsity and accuracy of every masked model.

    Parameters
    ----------
    models : name -> model made by `models.masks.masked`, others are refused; all see each image in one pass. Names
        that differ after their last "/" alone are of one pruning run.
    data : labelled images, of the models' classes.

    Returns
    -------
    A table of `COLUMNS`.
    """
    import pandas as pd

    from bvit_interp.probes.sharing import Sharing

    sharing = {name: Sharing(_masks(name, model)) for name, model in models.items()}
    sparsity = {name: float(shared.sparsity(ALL).mean()) for name, shared in sharing.items()}
    collapse = _collapse(sharing, sparsity)
    rows = []
    for name, of_data in _accuracies(models, data, config).items():
        found = [*of_data, *_of_masks(sharing[name], config), *collapse.get(name, [])]
        rows += [{"model": name, "sparsity": sparsity[name], **row} for row in found]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _masks(name: str, model: VisionTransformer) -> Masks:
    from bvit_interp.models.masks import PLACES, masks_of

    masks = masks_of(model)
    if masks is None:
        raise UserError(f"{name} has no masks; give a folder of a pruning run with them: FOLDER@masked")
    if set(masks) != set(PLACES) or masks.count != len(model.blocks):
        raise UserError(f"the masks of {name} are not of its {len(model.blocks)} steps")
    return masks


def _of_masks(sharing: Sharing, config: Config) -> Iterator[dict[str, Any]]:
    """The rows that the masks alone tell."""
    empty, by = float(config.empty), f"empty={config.empty}"
    yield from _rows("weight_sparsity_layer_mean", ALL, sharing.unused_by_layer().rows())
    for of in (ALL, *sharing.components):
        pruned = [PRUNED if left == 0 else None for left in sharing.sizes[of].tolist()]
        steps = [{"step": t, "flag": flag} for t, flag in enumerate(pruned, start=1)]
        pairs = [{"step": i + 1, "other_step": j + 1, "flag": pruned[i] and pruned[j]} for i, j in sharing.pairs]
        uses = [{"uses": u} for u in range(1, len(steps) + 1)]
        sparsity, n = sharing.sparsity(of), sharing.width[of]
        yield from _rows("mask_sparsity", of, [{"value": float(sparsity.mean()), "n": n}])
        yield from _rows("mask_sparsity", of, [{"value": value, "n": n} for value in sparsity.tolist()], steps)
        yield from _rows("weight_sparsity", of, sharing.unused(of).rows())
        yield from _rows("least_weight_sparsity", of, [{"value": sharing.least_unused(of), "n": sharing.weights[of]}])
        yield from _rows("mean_uses", of, sharing.mean_uses(of).rows(1, math.inf))
        yield from _rows("utilisation", of, sharing.utilisation(of).rows(), uses)
        yield from _rows("specialization", of, sharing.specialization(of).or_else(empty).rows(), steps, convention=by)
        yield from _rows("jaccard", of, sharing.jaccard(of, empty).rows(), pairs, convention=by)
        for each in dict.fromkeys((config.empty, "nan", "1")):
            mean = sharing.mean_jaccard(of, float(each)).rows()
            yield from _rows("jaccard_mean", of, mean, convention=f"empty={each}")


def _rows(
    statistic: str, component: str, numbers: Sequence[Mapping[str, Any]], places: Sequence[Mapping[str, Any]] = ({},),
    **same: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each of the numbers, at its place."""
    for row, place in zip(numbers, places, strict=True):
        yield {"statistic": statistic, "component": component, **row, **place, **same}


def _run(name: str) -> str:
    """The pruning run a model is of: its name up to the last "/"."""
    return name.rpartition("/")[0]


def _collapse(sharing: Mapping[str, Sharing], sparsity: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
    """How much the mean overlap rises from a model to the next sparser one of its run; empty layers are left out."""
    rows = {}
    for run in dict.fromkeys(map(_run, sharing)):
        names = sorted((name for name in sharing if _run(name) == run), key=sparsity.__getitem__)
        means = [sharing[name].mean_jaccard(ALL) for name in names]
        for name, before, now in zip(names[1:], means, means[1:], strict=False):
            (row,) = now.minus(before).rows(-1)
            flag = COLLAPSE if row["value"] > row["high"] - row["null"] else None
            rows[name] = [*_rows("collapse", ALL, [row], convention="empty=nan", flag=flag)]
    return rows


def _accuracies(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config
) -> dict[str, list[dict[str, Any]]]:
    """Rows of each model's accuracies, in one pass over the images."""
    import torch

    from bvit_interp.data.labels import label_map
    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.exchanges import Exchanges
    from bvit_interp.probes.reducers import Rows

    classes = {name: label_map(data, model) for name, model in models.items()}
    variants = {
        name: Exchanges(model, _masks(name, model), config.swaps, config.shuffles, config.seed)
        for name, model in models.items()
    }
    scores = {name: Rows() for name in models}
    loader, geometries = config.loader(data, models, "pathways")
    for batch in loader:
        for name, variant in variants.items():

            def run(part: Any, name: str = name, variant: Exchanges = variant) -> tuple[Tensor, Tensor]:
                wanted = classes[name][part.labels]
                with torch.inference_mode():
                    images = part.views[geometries[name]][0]
                    hits = [logits.argmax(-1).cpu() == wanted for logits in variant.logits(images)]
                return part.index, torch.stack([*hits, wanted], dim=1)

            for index, row in run_in_halves(run, batch):
                scores[name].update(index, row)
    return {name: _accuracy_rows(variants[name], scores[name].compute()[1]) for name in models}


def _accuracy_rows(variants: Exchanges, found: Tensor) -> list[dict[str, Any]]:
    """From hits of every variant and the class ``(n, variants + 1)``."""
    from bvit_interp.metrics import wilson_interval

    (*hits, labels), n = found.unbind(1), len(found)
    common = {"component": ALL, "null": int(labels.long().bincount().max()) / n, "n": n}

    def scored(statistic: str, of: Tensor) -> dict[str, Any]:
        low, high = wilson_interval(int(of.sum()), n)
        return {"statistic": statistic, **common, "value": float(of.mean()), "low": low, "high": high}

    swaps = {(t, t): hits[0] for t, _ in variants.swaps} | dict(zip(variants.swaps, hits[1:], strict=False))
    shuffled = [float(of.mean()) for of in hits[1 + len(variants.swaps) :]]
    rows = [scored("accuracy", hits[0])]
    if shuffled:
        mean = sum(shuffled) / len(shuffled)
        rows.append({"statistic": "shuffled", **common, "value": mean, "low": min(shuffled), "high": max(shuffled)})
    return rows + [scored("swapped", of) | {"step": t + 1, "other_step": s + 1} for (t, s), of in sorted(swaps.items())]


# ---- figure --------------------------------------------------------------------------------------------

_MATRICES = {"qkv": "qkv (MHSA)", "proj": "proj (MHSA)", "fc1": "fc1 (FFN, in)", "fc2": "fc2 (FFN, out)"}
_RANDOM = "independent masks"
_SPARSITIES = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_GREY = {"color": "0.45", "linewidth": 1.0}
_OPEN = {"linestyle": ":", "markerfacecolor": "none"}
_PANELS = {
    "overlap of two steps: mean Jaccard": (
        ("jaccard_mean", "empty=nan", "null", _RANDOM, _GREY),
        ("jaccard_mean", "empty=1", "value", "empty masks overlap by 1", _OPEN),
        ("jaccard_mean", "empty=nan", "value", "", {}),
    ),
    "accuracy": (
        ("accuracy", None, "null", "most frequent class", _GREY),
        ("shuffled", None, "value", "masks in other orders", _OPEN),
        ("accuracy", None, "value", "", {}),
    ),
    "weights used by no step": (
        ("weight_sparsity", None, "null", _RANDOM, _GREY),
        ("least_weight_sparsity", None, "value", "least possible", {**_GREY, "linestyle": ":"}),
        ("weight_sparsity", None, "sparsity", "one mask for all steps", {**_GREY, "linestyle": "--"}),
        ("weight_sparsity_layer_mean", None, "value", "mean of matrices", _OPEN),
        ("weight_sparsity", None, "value", "", {}),
    ),
}
"""Panel -> its lines, from below: statistic, convention, column, label (none: the run's name), change of style."""


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 14A-D in the first row; Figs. 5a, 14F, 14E and Table 7 in the second; then swapped masks (of four models).

    All over sparsity, the first four of the first run alone; of a single model, bars.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    from bvit_interp import plotting

    frame = frame.assign(run=frame["model"].map(_run))
    first = frame[frame["run"] == frame["run"].iloc[0]]
    swapped = list(frame[frame["statistic"] == "swapped"].groupby("model", sort=False))
    figure, axes = plotting.canvas(columns=4, rows=3 if swapped else 2, width=3.8, height=3.3)
    exclusive = first[first["statistic"] == "specialization"]
    for ax, (component, title) in zip(axes[0], _MATRICES.items(), strict=True):
        _draw_exclusive(ax, exclusive[exclusive["component"] == component], names=ax is axes[0, 0])
        ax.set_title(f"$S_t$ of {title}", fontsize=10)
        plotting.legend(ax)
    axes[0, 0].set_ylabel("share of a step's weights\nthat no other step uses")
    shades = _shades(int(first["step"].max()))
    colours = ScalarMappable(Normalize(0.5, shades.N + 0.5), shades)
    figure.colorbar(colours, ax=axes[0], label="step", pad=0.01, ticks=range(1, shades.N + 1))
    _draw_utilisation(axes[1, 0], first)
    plotting.legend(axes[1, 0])
    for ax, title in zip(axes[1, 1:], _PANELS, strict=True):
        _draw_panel(ax, frame[frame["component"] == ALL], title)
        ax.set_title(title, fontsize=10)
        plotting.legend(ax)
    for ax, (name, part) in zip(axes[2] if swapped else (), swapped, strict=False):
        table = part.pivot_table(index="step", columns="other_step", values="value")
        columns, rows = ([int(t) for t in labels] for labels in (table.columns, table.index))
        limits = (float(part[["null", "value"]].min().min()), float(part[["null", "value"]].max().max()))
        plotting.heat_map(figure, ax, table.to_numpy(), columns, rows, "accuracy", limits=limits)
        ax.set(xlabel="masks of step", ylabel="used at step")
        ax.set_title(str(name), fontsize=10)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    return figure


def _shades(steps: int) -> ListedColormap:
    """A colour for each step."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap([colormaps["viridis"](0.92 * t / max(steps - 1, 1)) for t in range(steps)])


def _density(frame: pd.DataFrame) -> pd.Series[float]:
    """Mask density, for a logarithmic axis: rounds that prune an equal share lie equally far apart."""
    return (1 - frame["sparsity"]).clip(lower=1e-6)


def _sparsity_axis(ax: Axes, frame: pd.DataFrame) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    most, least = _density(frame).max(), _density(frame).min()
    ticks = [1 - s for s in _SPARSITIES if least / 1.01 <= 1 - s <= most * 1.01]
    ax.set(xscale="log", xlim=(most * 1.1, least / 1.1), xlabel="mask sparsity, %")
    ax.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) > 2 else sorted({*_density(frame).round(3)})[:6]))
    ax.xaxis.set_major_formatter(lambda density, _: f"{100 * (1 - density):.3g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _draw_exclusive(ax: Axes, of: pd.DataFrame, names: bool) -> None:
    """S_t of every step with its null, named in the legend or not; a fully pruned step is an open marker at 1."""
    from bvit_interp import plotting

    steps, single = int(of["step"].max()), of["model"].nunique() == 1
    shades, half = _shades(steps), steps // 2
    labels = {1: f"steps 1 to {half}", half + 1: f"steps {half + 1} to {steps}"} if names else {}
    of = of.assign(x=of["step"] if single else _density(of)).sort_values("sparsity")
    for t, part in of[of["flag"] != PRUNED].groupby("step"):
        colour, random = shades(int(t) - 1), _RANDOM if names and t == 1 else None
        if single:
            ax.bar(part["x"], part["value"], color=colour)
            ax.plot([t - 0.4, t + 0.4], [*part["null"]] * 2, **_GREY, label=random)
        else:
            ax.plot(part["x"], part["null"], **_GREY, label=random)
            ax.plot(part["x"], part["value"], color=colour, linestyle="-" if t <= half else "--", label=labels.get(t))
    pruned = of[of["flag"] == PRUNED]
    if len(pruned):
        edges = [shades(int(t) - 1) for t in pruned["step"]]
        ax.scatter(pruned["x"], [1.0] * len(pruned), s=22, facecolors="none", edgecolors=edges, label="fully pruned")
    ax.set_ylim(0, 1.05)
    plotting.step_axis(ax, of["step"]) if single else _sparsity_axis(ax, of)


def _draw_utilisation(ax: Axes, first: pd.DataFrame) -> None:
    """Fig. 5a of the model nearest to the paper's 13th round."""
    from bvit_interp import plotting

    of = first[(first["statistic"] == "utilisation") & (first["component"] == ALL)]
    of = of[of["model"] == of.loc[(of["sparsity"] - (1 - 0.8**13)).abs().idxmin(), "model"]]
    ax.bar(of["uses"], of["value"], color=plotting.COLOURS[0], label="active weights")
    ax.plot(of["uses"], of["null"], **plotting.NULL, marker="_", label=_RANDOM)
    plotting.step_axis(ax, of["uses"])
    ax.set(xlabel="number of steps that use a weight", ylabel="share of the active weights")
    ax.set_title(f"utilisation at {of['sparsity'].iloc[0]:.1%} mask sparsity", fontsize=10)


def _draw_panel(ax: Axes, frame: pd.DataFrame, title: str) -> None:
    """Numbers of all components, one line a run and kind; of a single model, bars."""
    from bvit_interp import plotting

    single, runs = frame["model"].nunique() == 1, list(dict.fromkeys(frame["run"]))
    for statistic, convention, column, label, change in _PANELS[title]:
        of_kind = frame[(frame["statistic"] == statistic) & frame["step"].isna()]
        of_kind = of_kind[of_kind["convention"] == convention] if convention else of_kind
        for i, run in enumerate(runs):
            part = of_kind[of_kind["run"] == run].sort_values("sparsity")
            name = label or run or "the masks"
            x, y = _density(part), part[column]
            if single:
                for value in y:
                    ax.text(0.02, len(ax.patches), f"{name}: {value:.3f}", va="center", fontsize=9)
                    ax.barh(len(ax.patches), value, color="0.85" if change else plotting.COLOURS[5])
                continue
            style = change if "color" in change else plotting.line_style(i) | change
            ax.plot(x, y, **style, label=None if label and i else name)
            if statistic == "accuracy" and column == "value":
                ax.fill_between(x, part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)
    if single:
        ax.set(xlim=(0, 1.03), yticks=[])
    else:
        ax.set_ylim(0, 1.03)
        _sparsity_axis(ax, frame)
