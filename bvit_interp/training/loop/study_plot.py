"""The figure of a study: accuracy against what was varied, mean and spread over the seeds."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bvit_interp import plotting

_LABELS = {"width": "width D", "steps": "steps", "heads": "heads", "blocks": "distinct blocks"}


def plot(frame: pd.DataFrame) -> Figure:
    """Top-1 of the averaged weights, a line a series; bars are one standard deviation over the
    seeds."""
    name = str(frame["study"].iloc[0])
    figure, axes = plotting.canvas(width=5.2, height=3.6)
    ax = axes[0, 0]
    for i, (series, part) in enumerate(frame.groupby("series", sort=False)):
        seeds = part.groupby(name)["ema_top1"].agg(["mean", "std", "count"])
        label = (
            f"{series}, {seeds['count'].max()} seeds"
            if seeds["count"].max() > 1
            else f"{series}, one seed"
        )
        ax.errorbar(
            seeds.index,
            seeds["mean"],
            yerr=seeds["std"],
            capsize=3,
            label=label,
            **plotting.line_style(i),
        )
    ax.axhline(frame["chance"].iloc[0], **plotting.NULL, label="chance")
    ax.set_xscale("log", base=2)
    ax.set_xticks(
        sorted(frame[name].unique()), [str(value) for value in sorted(frame[name].unique())]
    )
    ax.minorticks_off()
    ax.set(xlabel=_LABELS[name], ylabel="top-1 of the averaged weights", ylim=(0, None))
    plotting.legend(ax)
    return figure
