"""Figure of `energy_rank`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 6: rank against step, one panel a matrix, with the random-matrix nulls; shares where
    widths differ."""
    titles = {"fc1": "FFN in-projection", "fc2": "FFN out-projection", "cls": "CLS token"}
    names = list(dict.fromkeys(frame["model"]))
    one_width = frame.loc[frame["matrix"] == "fc1", "full_rank"].nunique() == 1
    figure, axes = plotting.canvas(columns=3, width=3.9, height=3.5)
    for ax, (matrix, title) in zip(axes[0], titles.items(), strict=True):
        of_matrix = frame[frame["matrix"] == matrix]
        scale = 1.0 if one_width else of_matrix["full_rank"]
        for i, name in enumerate(names):
            part = of_matrix[of_matrix["model"] == name]
            # equal ranks lie on each other: markers take turns
            turns = (i, len(names)) if len(part) >= 2 * len(names) else 1
            y = (of_matrix["rank"] / scale)[part.index]
            ax.plot(part["step"], y, **plotting.line_style(i), markevery=turns, label=name)
        _draw_nulls(ax, of_matrix, one_width)
        ax.set_title(title, fontsize=10)
        plotting.step_axis(ax, of_matrix["step"])
    measured = "rank" if one_width else "rank / full rank"
    axes[0, 0].set_ylabel(f"{measured} at {frame['energy'].iloc[0]:.0%} energy")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        *lines, loc="outside lower center", ncols=min(len(names) + 1, 5), frameon=False, fontsize=8
    )
    return figure


def _draw_nulls(ax: Axes, of_matrix: pd.DataFrame, one_width: bool) -> None:
    """A thin grey line a shape of matrix, and above the highest what they stand for."""
    nulls = of_matrix[["full_rank", "random_rank"]].drop_duplicates().sort_values("full_rank")
    heights = nulls["random_rank"] / (1 if one_width else nulls["full_rank"])
    for i, height in enumerate(heights):
        ax.axhline(height, **plotting.NULL, label=None if i else "random matrix of the same shape")
    told = "random: " + ", ".join(
        f"{null.random_rank} of {null.full_rank}" for null in nulls.itertuples()
    )
    top = heights.max()
    ax.annotate(
        told,
        (1, top),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=plotting.NULL["color"],
        fontsize=8,
    )
    ax.set_ylim(0, 1.12 * max(top, of_matrix["rank" if one_width else "share"].max()))
