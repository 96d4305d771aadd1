"""Figure of `pathways`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from bvit_interp import plotting
from bvit_interp.analyses.pathways import ALL, PRUNED, run_of

_MATRICES = {
    "qkv": "qkv (MHSA)",
    "proj": "proj (MHSA)",
    "fc1": "fc1 (FFN, in)",
    "fc2": "fc2 (FFN, out)",
}


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
        (
            "weight_sparsity",
            None,
            "sparsity",
            "one mask for all steps",
            {**_GREY, "linestyle": "--"},
        ),
        ("weight_sparsity_layer_mean", None, "value", "mean of matrices", _OPEN),
        ("weight_sparsity", None, "value", "", {}),
    ),
}
"""Panel -> its lines, from below: statistic, convention, column, label (none: the run's name),
change of style."""


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 14A-D in the first row; Figs. 5a, 14F, 14E and Table 7 in the second; then swapped masks
    (of four models).

    All over sparsity, the first four of the first run alone; of a single model, bars.
    """
    frame = frame.assign(run=frame["model"].map(run_of))
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
        limits = (
            float(part[["null", "value"]].min().min()),
            float(part[["null", "value"]].max().max()),
        )
        plotting.heat_map(figure, ax, table.to_numpy(), columns, rows, "accuracy", limits=limits)
        ax.set(xlabel="masks of step", ylabel="used at step")
        ax.set_title(str(name), fontsize=10)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    return figure


def _shades(steps: int) -> ListedColormap:
    """A colour for each step."""
    return ListedColormap(
        [colormaps["viridis"](0.92 * t / max(steps - 1, 1)) for t in range(steps)]
    )


def _density(frame: pd.DataFrame) -> pd.Series[float]:
    """Mask density, for a logarithmic axis: rounds that prune an equal share lie equally far
    apart."""
    return (1 - frame["sparsity"]).clip(lower=1e-6)


def _sparsity_axis(ax: Axes, frame: pd.DataFrame) -> None:
    most, least = _density(frame).max(), _density(frame).min()
    ticks = [1 - s for s in _SPARSITIES if least / 1.01 <= 1 - s <= most * 1.01]
    ax.set(xscale="log", xlim=(most * 1.1, least / 1.1), xlabel="mask sparsity, %")
    ax.xaxis.set_major_locator(
        FixedLocator(ticks if len(ticks) > 2 else sorted({*_density(frame).round(3)})[:6])
    )
    ax.xaxis.set_major_formatter(lambda density, _: f"{100 * (1 - density):.3g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _draw_exclusive(ax: Axes, of: pd.DataFrame, names: bool) -> None:
    """S_t of every step with its null, named in the legend or not; a fully pruned step is an open
    marker at 1."""
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
            ax.plot(
                part["x"],
                part["value"],
                color=colour,
                linestyle="-" if t <= half else "--",
                label=labels.get(t),
            )
    pruned = of[of["flag"] == PRUNED]
    if len(pruned):
        edges = [shades(int(t) - 1) for t in pruned["step"]]
        ax.scatter(
            pruned["x"],
            [1.0] * len(pruned),
            s=22,
            facecolors="none",
            edgecolors=edges,
            label="fully pruned",
        )
    ax.set_ylim(0, 1.05)
    plotting.step_axis(ax, of["step"]) if single else _sparsity_axis(ax, of)


def _draw_utilisation(ax: Axes, first: pd.DataFrame) -> None:
    """Fig. 5a of the model nearest to the paper's 13th round."""
    of = first[(first["statistic"] == "utilisation") & (first["component"] == ALL)]
    of = of[of["model"] == of.loc[(of["sparsity"] - (1 - 0.8**13)).abs().idxmin(), "model"]]
    ax.bar(of["uses"], of["value"], color=plotting.COLOURS[0], label="active weights")
    ax.plot(of["uses"], of["null"], **plotting.NULL, marker="_", label=_RANDOM)
    plotting.step_axis(ax, of["uses"])
    ax.set(xlabel="number of steps that use a weight", ylabel="share of the active weights")
    ax.set_title(f"utilisation at {of['sparsity'].iloc[0]:.1%} mask sparsity", fontsize=10)


def _draw_panel(ax: Axes, frame: pd.DataFrame, title: str) -> None:
    """Numbers of all components, one line a run and kind; of a single model, bars."""
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
                ax.fill_between(
                    x, part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0
                )
    if single:
        ax.set(xlim=(0, 1.03), yticks=[])
    else:
        ax.set_ylim(0, 1.03)
        _sparsity_axis(ax, frame)
