"""The figure of a study: accuracy over what is varied."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bvit_interp import plotting

_LABELS = {"width": "width D", "steps": "steps", "heads": "heads", "blocks": "distinct blocks"}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy of the averaged weights: one line per series, the mean over seeds.

    Bands reach one standard deviation over the seeds to both sides.
    """
    varied = str(frame["study"].iloc[0])
    values = sorted(frame[varied].unique())
    figure, axes = plotting.canvas(width=5.2, height=3.6)
    ax = axes[0, 0]
    for i, (series, rows) in enumerate(frame.groupby("series", sort=False)):
        means = _over_seeds(rows, varied)
        seeds = int(means["seeds"].max())
        label = f"{series}, {seeds} seeds" if seeds > 1 else f"{series}, one seed"
        style, band = plotting.line_style(i), "standard deviation over seeds"
        plotting.line(ax, means, varied, style=style, label=label, interval_label=band)
    ax.axhline(frame["chance"].iloc[0], **plotting.NULL, label="chance")
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [str(value) for value in values])
    ax.minorticks_off()
    ax.set(xlabel=_LABELS[varied], ylabel="accuracy of the averaged weights", ylim=(0, None))
    plotting.legend(ax)
    return figure


def _over_seeds(rows: pd.DataFrame, varied: str) -> pd.DataFrame:
    """Mean over the seeds, the ends of its band, and the number of seeds, at each point."""
    means = rows.groupby(varied)["ema_accuracy"].agg(["mean", "std", "count"]).reset_index()
    return means.assign(
        value=means["mean"],
        low=means["mean"] - means["std"],
        high=means["mean"] + means["std"],
        seeds=means["count"],
    )
