"""Figure of `rank_sweep`, from its table alone."""

from __future__ import annotations

import itertools
import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.rank_sweep import ALL_STEPS

_TITLES = {
    "svd": "truncated SVD",
    "whitened": "least error over real inputs",
    "random": "random directions",
}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 7: accuracy against rank, one panel per method, with chance and random directions.

    Below, step against rank where one step is cut at a time.
    """
    frame = frame.assign(step=frame["step"].astype(str))
    together = frame[frame["step"] == ALL_STEPS]
    single = frame[frame["step"] != ALL_STEPS]
    methods = [method for method in _TITLES if method in set(together["method"])]
    curves = [method for method in methods if method != "random"] or methods
    tables = {
        key: rows for key, rows in single.groupby(["model", "method"]) if isinstance(key, tuple)
    }
    maps = [
        key for key in itertools.product(dict.fromkeys(single["model"]), _TITLES) if key in tables
    ]
    columns = max(len(curves), single["method"].nunique(), min(len(maps), 2))
    curve_rows = 1 if curves else 0
    figure, axes = plotting.canvas(
        columns, curve_rows + math.ceil(len(maps) / columns), width=4.4, height=3.4
    )
    for ax, method in zip(axes[0], curves, strict=False):
        _draw_curves(ax, together, method)
    if curves:
        axes[0, 0].set_ylabel("accuracy")
        plotting.legend_below(figure, axes[0])
    limits = (single["accuracy"].min(), single["accuracy"].max())
    for ax, (name, method) in zip(axes[curve_rows:].flat, maps, strict=False):
        _draw_map(figure, ax, tables[name, method], limits)
        plotting.title(ax, f"{name}: {_TITLES[method]}")
    plotting.leave_out_empty(figure, axes)
    return figure


def _draw_curves(ax: Axes, frame: pd.DataFrame, method: str) -> None:
    """Accuracy of every model by one method; thin and grey by random directions."""
    widths = (frame["rank"] / frame["share"]).round()
    x = "rank" if widths.nunique() == 1 else "share"
    names = list(dict.fromkeys(frame.sort_values("rank", kind="stable")["model"]))
    for i, name in enumerate(names):
        rows = frame[frame["model"] == name]
        style = plotting.line_style(i)
        chosen = rows[rows["method"] == method]
        plotting.line(ax, chosen, x, "accuracy", style=style, label=name)
        random = rows[rows["method"] == "random"]
        if method != "random" and len(random):
            pale = plotting.null_style(style) | {"gid": plotting.NULL_MARK}
            label = None if i else "null: random directions"
            plotting.line(ax, random, x, "accuracy", style=pale, label=label, interval=None)
    chance = frame["chance"].iloc[0]
    ax.axhline(chance, **plotting.NULL)
    ax.text(1, chance + 0.01, "chance", transform=ax.get_yaxis_transform(), ha="right", fontsize=8)
    ax.set(xlabel="rank k" if x == "rank" else "rank k / width")
    plotting.share_axis(ax)
    ax.set_title(_TITLES[method], fontsize=10)


def _draw_map(figure: Figure, ax: Axes, rows: pd.DataFrame, limits: tuple[float, float]) -> None:
    """Accuracy by the step that is cut and its rank."""
    table = rows.astype({"step": int}).pivot(index="step", columns="rank", values="accuracy")
    ranks, steps = list(table.columns), list(table.index)
    plotting.heat_map(figure, ax, table.to_numpy(), ranks, steps, "accuracy", limits=limits)
    ax.set(xlabel="rank k of the step that is cut", ylabel="step that is cut")
