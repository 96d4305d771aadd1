"""Figure of `cost`, from its table alone."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Bars of parameters, FLOPs and times, one row per model."""
    figure, axes = plotting.canvas(columns=4, width=2.9, height=1.1 + 0.42 * len(frame))
    parameters, flops, latency, throughput = axes[0]
    _bars(parameters, frame, frame["parameters"] / 1e6, "parameters, M")
    _flops(flops, frame)
    _latency(latency, frame)
    _bars(throughput, frame, frame["throughput"], "images per second")
    for ax in axes[0]:
        ax.grid(visible=False)
        ax.tick_params(labelleft=ax is parameters, left=False)
        ax.invert_yaxis()
    parameters.set_yticks(range(len(frame)), [plotting.shortened(name) for name in frame["model"]])
    first = frame.iloc[0]
    title = f"{first['device']}, threads: {first['threads']}, {first['dtype']}; times are medians"
    figure.suptitle(title, fontsize=9)
    return figure


def _flops(ax: Axes, frame: pd.DataFrame) -> None:
    """FLOPs without attention, and hatched those of attention."""
    with_attention = frame["gflops_attention"]
    title = "GFLOPs per image (hatched: QKᵀ, AV)"
    _bars(ax, frame, frame["gflops"], title, ends=with_attention)
    ax.barh(
        frame["model"],
        with_attention - frame["gflops"],
        left=frame["gflops"],
        color="0.8",
        height=0.6,
        hatch="////",
        edgecolor="white",
    )


def _latency(ax: Axes, frame: pd.DataFrame) -> None:
    """Time of one image with its quartiles."""
    times = frame["latency_ms"]
    _bars(ax, frame, times, "one image, ms", ends=frame["latency_high"])
    error = [times - frame["latency_low"], frame["latency_high"] - times]
    ax.errorbar(
        times, frame["model"], xerr=error, fmt="none", ecolor="black", capsize=2, linewidth=1
    )


def _bars(
    ax: Axes, frame: pd.DataFrame, values: pd.Series, title: str, ends: pd.Series | None = None
) -> None:
    """A bar per model, with its number written behind `ends` (by default the end of the bar)."""
    ends = values if ends is None else ends
    ax.barh(frame["model"], values, color=plotting.COLOURS[0], height=0.6)
    for y, (value, end) in enumerate(zip(values, ends.fillna(0), strict=True)):
        ax.annotate(
            _number(value), (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    ax.set_title(title, fontsize=9)
    ax.set_xlim(0, 1.3 * ends.fillna(1).max())


def _number(value: float) -> str:
    if math.isnan(value):
        return "not known"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
