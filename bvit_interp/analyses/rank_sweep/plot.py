"""Figure of `rank_sweep`, from its table alone."""

from __future__ import annotations

import itertools
import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_TITLES = {
    "svd": "truncated SVD",
    "whitened": "least error over real inputs",
    "random": "random directions",
}


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 7: accuracy against rank, a panel a method, with chance and random directions; below,
    step against rank."""
    frame = frame.assign(step=frame["step"].astype(str))
    together, single = frame[frame["step"] == "all"], frame[frame["step"] != "all"]
    methods = [method for method in _TITLES if method in set(together["method"])]
    curves = [method for method in methods if method != "random"] or methods
    by_map = dict([*single.groupby(["model", "method"])])
    maps = [
        key for key in itertools.product(dict.fromkeys(single["model"]), _TITLES) if key in by_map
    ]
    columns = max(len(curves), single["method"].nunique(), min(len(maps), 2))
    first = bool(curves)  # rows of curves
    figure, axes = plotting.canvas(
        columns, first + math.ceil(len(maps) / columns), width=4.4, height=3.4
    )
    for ax, method in zip(axes[0], curves, strict=False):
        _draw_curves(ax, together, method)
    if curves:
        axes[0, 0].set_ylabel("accuracy")
        lines = axes[0, 0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    for ax, (name, method) in zip(axes[first:].flat, maps, strict=False):
        table = (
            by_map[name, method]
            .astype({"step": int})
            .pivot(index="step", columns="rank", values="accuracy")
        )
        values, ranks, steps = table.to_numpy(), list(table.columns), list(table.index)
        limits = (single["accuracy"].min(), single["accuracy"].max())
        plotting.heat_map(figure, ax, values, ranks, steps, "accuracy", limits=limits)
        ax.set(
            xlabel="rank k of the one step", ylabel="step cut", title=f"{name}: {_TITLES[method]}"
        )
        ax.title.set_fontsize(10)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    return figure


def _draw_curves(ax: Axes, frame: pd.DataFrame, method: str) -> None:
    """Accuracy of every model at every rank by one method, and thin and grey by random
    directions."""
    widths = (frame["rank"] / frame["share"]).round()
    x = "rank" if widths.nunique() == 1 else "share"
    for i, (name, of_model) in enumerate(frame.sort_values("rank").groupby("model", sort=False)):
        part, null = (of_model[of_model["method"] == which] for which in (method, "random"))
        style = plotting.line_style(i)
        ax.plot(part[x], part["accuracy"], **style, label=name)
        ax.fill_between(
            part[x], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0
        )
        if method != "random":
            last = i == frame["model"].nunique() - 1
            label = "random directions, in the dash of the model" if last and len(null) else None
            ax.plot(
                null[x], null["accuracy"], **{**style, **plotting.NULL, "marker": ""}, label=label
            )
    chance = frame["chance"].iloc[0]
    ax.axhline(chance, **plotting.NULL)
    ax.text(1, chance + 0.01, "chance", transform=ax.get_yaxis_transform(), ha="right", fontsize=8)
    ax.set(xlabel="rank k" if x == "rank" else "rank k / width", ylim=(0, 1), title=_TITLES[method])
    ax.title.set_fontsize(10)
