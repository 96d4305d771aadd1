"""Figure of `energy_rank`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_TITLES = {"fc1": "FFN in-projection", "fc2": "FFN out-projection", "cls": "CLS token"}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 6: rank against step, one panel per matrix, with the ranks of random matrices.

    Models of different widths are drawn as shares of the full rank.
    """
    names = list(dict.fromkeys(frame["model"]))
    one_width = frame.loc[frame["matrix"] == "fc1", "full_rank"].nunique() == 1
    column = "rank" if one_width else "share"
    figure, axes = plotting.canvas(columns=3, width=3.9, height=3.5)
    for ax, (matrix, title) in zip(axes[0], _TITLES.items(), strict=True):
        rows = frame[frame["matrix"] == matrix]
        for i, name in enumerate(names):
            line = rows[rows["model"] == name]
            # equal ranks hide each other, so the markers of different models alternate
            markers = (i, len(names)) if len(line) >= 2 * len(names) else 1
            style = plotting.line_style(i) | {"markevery": markers}
            plotting.line(ax, line, "step", column, style=style, label=name, interval=None)
        _draw_nulls(ax, rows, column)
        ax.set_title(title, fontsize=10)
        plotting.step_axis(ax, rows["step"])
    measured = "rank" if one_width else "rank / full rank"
    axes[0, 0].set_ylabel(f"{measured} at {frame['energy'].iloc[0]:.0%} energy")
    highest = max(ax.get_ylim()[1] for ax in axes[0])
    for ax in axes[0]:  # one scale
        ax.set_ylim(0, highest)
    plotting.legend_below(figure, axes[0])
    return figure


def _draw_nulls(ax: Axes, rows: pd.DataFrame, column: str) -> None:
    """A thin grey line per shape of matrix, with the ranks written above the highest."""
    nulls = rows[["full_rank", "random_rank"]].drop_duplicates().sort_values("full_rank")
    heights = nulls["random_rank"] / (1 if column == "rank" else nulls["full_rank"])
    for i, height in enumerate(heights):
        ax.axhline(height, **plotting.NULL, label=None if i else "random matrix of the same shape")
    ranks = ", ".join(
        f"{random} of {full}"
        for random, full in zip(nulls["random_rank"], nulls["full_rank"], strict=True)
    )
    top = heights.max()
    ax.annotate(
        f"random: {ranks}",
        (1, top),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=plotting.NULL["color"],
        fontsize=8,
    )
    ax.set_ylim(0, 1.12 * max(top, rows[column].max()))
