"""Figure of `step_accuracy`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

# column: title, null column, label of the null
_PANELS = {
    "accuracy": (
        "top-1 accuracy of the head after the step",
        "chance",
        "null: most frequent class",
    ),
    "agreement": ("same prediction as after step T", None, None),
    "true_rank": ("mean rank of the true class", "true_rank_null", "null: logits in random order"),
    "flips": (
        "prediction differs from the previous step",
        "flips_null",
        "null: independent predictions",
    ),
}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 8: accuracy against step; then agreement with step T, rank of the true class, and flips
    between steps."""
    figure, axes = plotting.canvas(columns=2, rows=2, width=5.0, height=3.2)
    shown = [column for column in _PANELS if frame[column].notna().any()]
    for ax, column in zip(axes.flat, shown, strict=False):
        _plot_column(ax, frame, column)
        ax.set_ylabel("rank, 1 = first" if column == "true_rank" else "share of images")
    plotting.leave_out_empty(figure, axes)
    plotting.legend_below(figure, axes.flat[: len(shown)])
    return figure


def _plot_column(ax: Axes, frame: pd.DataFrame, column: str) -> None:
    """One column of every model against the step, with its null."""
    title, null, null_label = _PANELS[column]
    first = column == "accuracy"
    names = list(dict.fromkeys(frame["model"]))
    for i, name in enumerate(names):
        plotting.line(
            ax,
            frame[frame["model"] == name],
            "step",
            column,
            style=plotting.line_style(i),
            label=name if first else None,
            interval=("low", "high") if first else None,
            null=null,
            null_label=null_label if name == names[0] else None,
        )
    for trained in sorted(set(frame["trained_steps"])):
        label = f"trained for T = {trained}" if first else None
        ax.axvline(trained, **plotting.NULL, linestyle="--", label=label)
    plotting.title(ax, title)
    ax.set_ylim(*((1, None) if column == "true_rank" else (0, 1.02)))
    ax.set_xlim(0.5, frame["step"].max() + 0.5)
    plotting.step_axis(ax, frame["step"])
