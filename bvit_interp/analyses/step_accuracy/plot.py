"""Figure of `step_accuracy`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bvit_interp import plotting


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 8: accuracy against step; then agreement with step T, flips between steps, and the true
    class's rank."""
    figure, axes = plotting.canvas(columns=2, rows=2, width=5.0, height=3.2)
    panels = {
        "top1": ("top-1 of the head after the step", "chance", "chance: most frequent class"),
        "agreement": ("same answer as after step T", None, ""),
        "true_rank": ("mean rank of the true class", "rank_null", "logits in random order"),
        "flips": ("answer differs from the step before's", "flips_null", "independent answers"),
    }
    for ax, (column, (title, null, label)) in zip(axes.flat, panels.items(), strict=True):
        for i, (name, part) in enumerate(frame.groupby("model", sort=False)):
            style = plotting.line_style(i)
            ax.plot(part["step"], part[column], **style, label=name if column == "top1" else None)
            if column == "top1":
                ax.fill_between(
                    part["step"],
                    part["low"],
                    part["high"],
                    color=style["color"],
                    alpha=0.15,
                    linewidth=0,
                )
            if null:
                ax.plot(part["step"], part[null], **plotting.NULL, label=None if i else label)
        for trained in sorted(set(frame["trained_steps"])):
            ax.axvline(
                trained,
                **plotting.NULL,
                linestyle="--",
                label=f"trained for T = {trained}" if column == "top1" else None,
            )
        ax.set_title(title, fontsize=10)
        ax.set_ylim(*((1, None) if column == "true_rank" else (0, 1.02)))
        ax.set_xlim(0, frame["step"].max() + 1)
        plotting.step_axis(ax, frame["step"])
        plotting.legend(ax)
    for ax, label in zip(axes[:, 0], ("share of images", "rank, 1 = first"), strict=True):
        ax.set_ylabel(label)
    return figure
