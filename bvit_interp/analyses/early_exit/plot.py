"""Figure of `early_exit`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy against FLOPs with the random-exit null, time saved against FLOPs saved, and the
    accuracy and AUROC of each exit."""
    figure, axes = plotting.canvas(columns=3, width=4.4, height=3.4)
    accuracy, saved, exits = axes[0]
    for i, name in enumerate(dict.fromkeys(frame["model"])):
        tables = dict(tuple(frame[frame["model"] == name].groupby("table", sort=False)))
        _accuracy(accuracy, tables, i, name)
        _saved(saved, tables, i, name)
        _exits(exits, tables["exit"], i)
    ends = [min(0, *saved.get_xlim()), max(saved.get_xlim())]
    saved.plot(ends, ends, **plotting.NULL, label="time saved = FLOPs saved")
    exits.axhline(0.5, **plotting.NULL, label="AUROC of chance")
    accuracy.set(xlabel="GFLOPs per image", ylabel="accuracy")
    saved.set(xlabel="share of FLOPs saved", ylabel="share of time saved")
    exits.set(ylabel="share", ylim=(None, 1.02))
    titles = ("threshold from 0 to 1", "measured time", "each classifier on all images")
    for ax, title in zip(axes[0], titles, strict=True):
        plotting.title(ax, title)
    plotting.step_axis(exits, frame["exit"].dropna())
    plotting.legend_below(figure, axes[0])
    return figure


def _accuracy(ax: Axes, tables: dict[str, pd.DataFrame], i: int, name: str) -> None:
    """Accuracy against FLOPs: a curve over all thresholds, and points at the chosen ones."""
    style = plotting.line_style(i)
    plotting.line(
        ax,
        tables["curve"],
        "gflops",
        "accuracy",
        style=style | {"marker": ""},
        label=name,
        null="accuracy_null",
        null_label=None if i else "leaving at random",
    )
    chosen = tables["threshold"]
    ax.plot(chosen["gflops"], chosen["accuracy"], **(style | {"linestyle": ""}))


def _saved(ax: Axes, tables: dict[str, pd.DataFrame], i: int, name: str) -> None:
    """Time saved against FLOPs saved: of the curve if its time was measured."""
    timed = tables["curve" if tables["curve"]["latency_ms"].notna().any() else "threshold"]
    style = plotting.line_style(i) | {"linewidth": 0.8}
    plotting.line(ax, timed, "saved_flops", "saved_time", style=style, label=name, interval=None)


def _exits(ax: Axes, exits: pd.DataFrame, i: int) -> None:
    """Accuracy and AUROC of each classifier; the other panels name the models."""
    style = plotting.line_style(i)
    hollow = style | {"markerfacecolor": "white"}
    for column, mark, label in (
        ("accuracy", style, "accuracy (filled)"),
        ("auroc", hollow, "AUROC (hollow)"),
    ):
        shown = None if i else label
        plotting.line(ax, exits, "exit", column, style=mark, label=shown, interval=None)
