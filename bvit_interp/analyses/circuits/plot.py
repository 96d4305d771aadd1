"""Figure of `circuits`, from its table alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.circuits import LABELS, Method

_NULL_DASHES = {"random": "-", "even-random": "--", "same-random": ":"}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """KL against size by condition, a panel per model (small dots: single draws), and accuracy;
    below, the gates at one size, and their overlap."""
    if "draw" not in frame:  # an older table
        frame = frame.assign(draw="all")
    methods = [name for name in get_args(Method) if name in set(frame["method"])]
    models, whole = list(dict.fromkeys(frame["model"])), frame[frame["step"] == "all"]
    figure, axes = plotting.canvas(len(models) + 1, 2, width=4.6, height=3.6)
    size = sorted(set(frame["fraction"]) - {1.0})[(frame["fraction"].nunique() - 1) // 2]
    steps = frame[
        (frame["site"] != "all") & (frame["method"] == methods[-1]) & (frame["fraction"] == size)
    ]
    for (top, below), model in zip(axes.T, models, strict=False):
        _draw_conditions(top, whole[(whole["model"] == model) & (whole["method"] == methods[-1])])
        plotting.title(top, f"{model}: {methods[-1]} gates")
        _draw_gates(below, steps[steps["model"] == model])
        below.set_title(f"open gates, {size:.0%} at each site", fontsize=10)
    highest = max(ax.get_ylim()[1] for ax in axes[0, :-1])
    for ax in axes[0, :-1]:  # one scale
        ax.set_ylim(0, highest)
    _draw_accuracy(axes[0, -1], whole, methods)
    _draw_overlap(axes[1, -1], steps[steps["site"] == "mlp_post"], models)
    plotting.legend_below(figure, axes[0, :-1])
    return figure


def _draw_conditions(ax: Axes, frame: pd.DataFrame) -> None:
    for i, (condition, label) in enumerate(LABELS.items()):
        style = plotting.line_style(i)
        if condition in _NULL_DASHES:
            style = plotting.NULL | {"linestyle": _NULL_DASHES[condition]}
        of_condition, ends = frame[frame["condition"] == condition], ("kl_low", "kl_high")
        is_mean = of_condition["draw"] == "all"
        draws = of_condition[~is_mean]
        dots = {"color": style["color"], "markersize": 3, "markeredgewidth": 0, "alpha": 0.6}
        ax.plot(draws["fraction"], draws["kl"], ".", **dots, zorder=1)
        rows = of_condition[is_mean]
        plotting.line(ax, rows, "fraction", "kl", style=style, label=label, interval=ends)
    ax.set(xlabel="share of open gates", ylabel="KL from the whole model, nats", ylim=(0, None))
    ax.set_xticks(sorted(set(frame["fraction"])))


def _draw_gates(ax: Axes, frame: pd.DataFrame) -> None:
    """A raster of units by steps: open gates dark, heads above the groups of neurons."""
    heads, groups = (
        np.array([[gate == "#" for gate in row] for row in frame["gates"][frame["site"] == site]])
        for site in ("z", "mlp_post")
    )
    raster, count = np.concatenate([heads, groups], axis=1), heads.shape[1]
    ax.grid(visible=False)
    ax.imshow(raster.T, aspect="auto", cmap="Greys", vmax=1.4, interpolation="nearest")
    ax.axhline(count - 0.5, color=plotting.COLOURS[1], linewidth=1.5)
    ax.set(xticks=range(len(raster)), xticklabels=range(1, len(raster) + 1), xlabel="step")
    middles = [(count - 1) / 2, (count + raster.shape[1] - 1) / 2]
    ax.set_yticks(middles, ["heads", "neuron groups"], rotation=90, va="center", fontsize=8)


def _draw_accuracy(ax: Axes, whole: pd.DataFrame, methods: Sequence[str]) -> None:
    circuits = whole[whole["condition"].isin(("per-step", "full"))]
    for i, (model, part) in enumerate(circuits.groupby("model", sort=False)):
        for method in methods:
            is_last = method == methods[-1]
            plotting.line(
                ax,
                part[part["method"].isin((method, "none"))],
                "fraction",
                "accuracy",
                style=plotting.line_style(i) | ({} if is_last else {"markerfacecolor": "white"}),
                label=str(model) if is_last else None,
            )
    chance = whole["chance"].iloc[0]
    ax.axhline(chance, **plotting.NULL)
    ax.annotate("null: most frequent class", (1, chance - 0.01), ha="right", va="top", fontsize=8)
    ax.set(xlabel="share of open gates", ylabel="accuracy")
    ax.set_xticks(sorted(set(circuits["fraction"])))
    plotting.share_axis(ax)
    hollow = " (hollow: gradient)" if len(methods) > 1 else ""
    ax.set_title(f"accuracy of the circuits{hollow}", fontsize=10)
    plotting.legend(ax)


def _draw_overlap(ax: Axes, frame: pd.DataFrame, models: Sequence[str]) -> None:
    frame = frame.assign(step=frame["step"].astype(int))
    for i, model in enumerate(models):
        rows, style = frame[frame["model"] == model], plotting.line_style(i)
        plotting.line(
            ax,
            rows,
            "step",
            "overlap",
            style=style,
            label=model,
            interval=None,
            null="overlap_null",
            null_label=None if i else "null: random gates",
            null_interval=("overlap_null_low", "overlap_null_high"),
        )
    ax.set_ylabel("mean Jaccard overlap")
    plotting.share_axis(ax)
    ax.set_title("neuron groups shared with other steps", fontsize=10)
    plotting.step_axis(ax, frame["step"])
    plotting.legend(ax)
