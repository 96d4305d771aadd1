"""Figure of `cost`, from its table alone."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from bvit_interp import plotting


def plot(frame: pd.DataFrame) -> Figure:
    """Bars of parameters, FLOPs and times, one row a model."""
    figure, axes = plotting.canvas(columns=4, width=2.9, height=1.1 + 0.42 * len(frame))
    first = frame.iloc[0]
    panels = {
        "parameters, M": frame["parameters"] / 1e6,
        "GFLOPs an image": frame["gflops"],
        "one image, ms": frame["latency_ms"],
        "images a second": frame["throughput"],
    }
    for ax, (title, values) in zip(axes[0], panels.items(), strict=True):
        ax.barh(frame["model"], values, color=plotting.COLOURS[0], height=0.6)
        ends = values
        if title == "GFLOPs an image":
            ends = frame["gflops_attention"]
            ax.barh(
                frame["model"],
                ends - values,
                left=values,
                color="0.8",
                height=0.6,
                hatch="////",
                edgecolor="white",
            )
            title += " (hatched: QK$^T$, AV)"
        elif title == "one image, ms":
            ends = frame["latency_high"]
            reach = [values - frame["latency_low"], ends - values]
            ax.errorbar(
                values,
                frame["model"],
                xerr=reach,
                fmt="none",
                ecolor="black",
                capsize=2,
                linewidth=1,
            )
        for y, (value, end) in enumerate(zip(values, ends.fillna(0), strict=True)):
            number = (
                "not known"
                if math.isnan(value)
                else f"{value:.0f}"
                if value >= 100
                else f"{value:.3g}"
            )
            ax.annotate(
                number, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        ax.set_title(title, fontsize=9)
        ax.set_xlim(0, 1.3 * ends.fillna(1).max())
        ax.grid(visible=False)
        ax.tick_params(labelleft=ax is axes[0, 0], left=False)
        ax.invert_yaxis()
    figure.suptitle(
        f"{first['device']}, threads: {first['threads']}, {first['dtype']}; times are medians",
        fontsize=9,
    )
    return figure
