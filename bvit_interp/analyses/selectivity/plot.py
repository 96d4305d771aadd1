"""Figure of `selectivity`, from its table alone."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.selectivity import RANKED

_FIRST_OF_RANKING = {
    "onset": "latest onset",
    "offset": "earliest offset",
    "profile_change": "largest change",
    "profile_stability": "most stable",
}
_MOST_MODELS = 3  # in the panel of all neurons

Models = list[tuple[Any, pd.DataFrame]]
"""Name of each model, and its rows."""


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Neurons only: selectivity, onset and offset, changes of profile, and some neurons in full."""
    whole = {"unit", "step", "window"} & set(frame)  # a table of an earlier version has no window
    typed = frame.astype(dict.fromkeys(whole, "Int64"))
    models = list(typed[typed["site"] == "mlp_post"].groupby("model", sort=False))
    figure, axes = plotting.canvas(columns=3, rows=2, width=4.6, height=3.8)
    _all_neurons(figure, axes[0, 0], models)
    _selective_share(axes[0, 1], models)
    _windows(axes[0, 2], models)
    _distribution(axes[1, 0], models, "reliability")
    axes[1, 0].set_title("reliability of the profile, all neurons", fontsize=10)
    axes[1, 0].set_xlabel("r of two halves of the images")
    name, first = models[0]
    labels = _labels_of_described(first)
    _described(axes[1, 1], first[first["metric"] == "selectivity"], labels)
    axes[1, 1].axhline(0, **plotting.NULL, linestyle="--", label="permuted labels")
    plotting.title(axes[1, 1], f"selectivity of described neurons\n{name}")
    one_step = first[(first["metric"] == "ablation_logit") & first["step"].notna()]
    _described(axes[1, 2], one_step, labels, null_label="random neurons")
    plotting.title(axes[1, 2], f"change of the true logit, ablated at one step\n{name}")
    for ax in (axes[1, 1], axes[1, 2]):
        plotting.legend(ax, below=True)
    plotting.legend_below(figure, [axes[0, 1], axes[0, 2], axes[1, 0]])
    plotting.leave_out_empty(figure, axes)
    return figure


def _all_neurons(figure: Figure, ax: Axes, models: Models) -> None:
    """Selectivity of every neuron at every step, by onset and then offset; models side by side."""
    ax.grid(visible=False)
    shown: list[pd.DataFrame] = []
    ticks: dict[int, str] = {}
    start = 0
    for name, rows in models[:_MOST_MODELS]:
        table = _by_onset(rows[rows["unit"].notna()])
        shown += [table, pd.DataFrame({"gap": [float("nan")]})]
        steps = len(table.columns)
        ticks |= {start + t - 1: str(t) for t in range(1, steps + 1) if t % 4 == 0 or t == 1}
        ticks[start + steps - 1] = str(steps)
        middle = start + (steps - 1) / 2
        above = plotting.wrapped(str(name), 50 // min(len(models), _MOST_MODELS))
        ax.text(middle, -0.01 * len(table), above, ha="center", va="bottom", fontsize=8)
        start += steps + 1
    matrix = pd.concat(shown[:-1], axis=1).to_numpy(float)
    image = ax.imshow(
        matrix, aspect="auto", cmap=plotting.SEQUENTIAL, vmin=0, interpolation="nearest"
    )
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set(xlabel="step", ylabel="neurons, by onset and offset")
    ax.set_title("selectivity of every neuron\n", fontsize=10)
    figure.colorbar(image, ax=ax, label="debiased η²", shrink=0.9)


def _by_onset(rows: pd.DataFrame) -> pd.DataFrame:
    """Selectivity ``(neurons, steps)``, in the order of onset, then offset, then the peak."""
    selectivity = rows[rows["metric"] == "selectivity"]
    table = selectivity.pivot(index="unit", columns="step", values="value")
    ends = rows[rows["metric"].isin(("onset", "offset"))]
    period = ends.pivot(index="unit", columns="metric", values="value")
    order = period.assign(peak=-table.max(axis=1)).sort_values(["onset", "offset", "peak"]).index
    return table.loc[order].reset_index(drop=True)


def _selective_share(ax: Axes, models: Models) -> None:
    """Share of selective neurons at each step; bars for onsets, and below 0 for offsets."""
    for i, (name, rows) in enumerate(models):
        style = plotting.line_style(i)
        share = rows[rows["metric"] == "selective_share"]
        null_label = None if i else "random groups of images"
        plotting.line(
            ax, share, "step", style=style, label=name, null="null", null_label=null_label
        )
        last, neurons = share["step"].max(), share["n"].iloc[0]
        shift = 0.3 * (i - (len(models) - 1) / 2)
        for metric, sign in (("onset", 1), ("offset", -1)):
            steps = rows.loc[(rows["metric"] == metric) & rows["unit"].notna(), "value"].dropna()
            if metric == "offset":  # a neuron that is selective at the last step has not ended
                steps = steps[steps < last]
            counts = steps.value_counts()
            at = counts.index.to_numpy(float) + shift
            ax.bar(at, sign * counts / neurons, width=0.3, color=style["color"], alpha=0.6)
    plotting.step_axis(ax, models[0][1]["step"].dropna())
    ax.set_ylabel("share of neurons")
    ax.set_title("selective neurons (bars: onset, below 0 offset)", fontsize=10)


def _windows(ax: Axes, models: Models) -> None:
    """Correlation of the profiles of a step and of a fixed number of steps later, without noise;
    nothing for tables that do not have it."""
    for i, (name, rows) in enumerate(models):
        of_model = rows[(rows["metric"] == "window_r_corrected") & rows["step"].notna()]
        if not len(of_model):
            return
        for marker, (window, part) in zip("osd", of_model.groupby("window"), strict=False):
            style = plotting.line_style(i) | {"marker": marker}
            label = f"{name}, {window} later"
            plotting.line(ax, part, "step", style=style, label=label, null="null")
    plotting.step_axis(ax, models[0][1]["step"].dropna())
    ax.set_ylabel("r, corrected for noise")
    ax.set_title("profiles of a step and of steps later", fontsize=10)


def _distribution(ax: Axes, models: Models, metric: str) -> None:
    """Cumulative shares of neurons by a metric and its null."""
    for i, (name, rows) in enumerate(models):
        style = plotting.line_style(i) | {"marker": ""}
        null = plotting.null_style(style) | {"gid": plotting.NULL_MARK}
        label = None if i else "profile of the next neuron"
        _cumulative(ax, rows, metric, "null", null | {"label": label})
        _cumulative(ax, rows, metric, "value", style | {"label": plotting.label_of(name)})
    ax.set(ylabel="share of neurons", ylim=(0, 1.02))


def _cumulative(
    ax: Axes, rows: pd.DataFrame, metric: str, column: str, style: dict[str, Any]
) -> None:
    units = rows[(rows["metric"] == metric) & rows["unit"].notna()]
    values = units[column].dropna().sort_values()
    ax.plot(values, [(rank + 1) / len(values) for rank in range(len(values))], **style)


def _labels_of_described(rows: pd.DataFrame) -> dict[int, str]:
    """Labels of the described neurons: the number, and the rankings that each leads."""
    described = dict.fromkeys(rows.loc[rows["metric"] == "class_mean", "unit"])
    leaders = rows[rows["rank"] == 1].set_index("metric")["unit"]
    labels = {}
    for unit in list(described)[: len(RANKED)]:
        led = [_FIRST_OF_RANKING[metric] for metric in RANKED if leaders.get(metric) == unit]
        labels[int(unit)] = ", ".join([f"neuron {unit}", *led])
    return labels


def _described(
    ax: Axes, frame: pd.DataFrame, labels: dict[int, str], null_label: str | None = None
) -> None:
    """A line per described neuron over the steps; with a label of the null, also the null."""
    for i, (unit, label) in enumerate(labels.items()):
        plotting.line(
            ax,
            frame[frame["unit"] == unit],
            "step",
            style=plotting.line_style(i),
            label=label,
            null="null" if null_label else None,
            null_label=None if i else null_label,
        )
    plotting.step_axis(ax, frame["step"])
