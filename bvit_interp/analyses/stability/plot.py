"""Figure of `stability`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_NAMES = {"cls": "CLS", "patches": "patches"}
_LOOKS: tuple[dict[str, Any], ...] = (
    {"linestyle": "-"},
    {"linestyle": "--", "markerfacecolor": "white"},
)
"""Of the first and the second series of a panel."""


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Amplification by step, along the run and by kind of token; how far perturbed runs get.

    Runs are those perturbed at the first start by the largest `eps`.
    """
    figure, axes = plotting.canvas(columns=3, rows=2, width=4.8, height=3.7)
    horizon = frame["model"].map(_metric(frame, "ftle").groupby("model")["step"].max())
    at_horizon = frame[frame["step"] == horizon]
    first = frame[frame["index"].isna() | (frame["index"] == 1)]
    _series(
        axes[0, 0],
        {
            "largest singular value": _metric(first, "singular_value"),
            "spectral radius": _metric(first, "spectral_radius"),
        },
        title="Jacobian of each step",
        label="ratio of norms",
        neutral=1,
    )
    _series(
        axes[0, 1],
        {
            "worst directions": _metric(at_horizon, "ftle"),
            "random directions (QR)": _metric(at_horizon, "lyapunov_exponent"),
        },
        x="index",
        title="largest exponents over steps 1..T",
        label="nats per step",
        neutral=0,
    )
    axes[0, 1].set_xlabel("exponent")
    _series(
        axes[0, 2],
        {
            "of the state": _metric(first, "lyapunov_exponent"),
            "minus growth of ||z||": _metric(first, "lyapunov_exponent_relative"),
        },
        title="first exponent over steps 1..t (QR)",
        label="nats per step",
        neutral=0,
    )
    _perturbed_runs(axes[1, 0], axes[1, 1], frame)
    plotting.share_axis(axes[1, 1])
    _gains(axes[1, 2], _metric(at_horizon, "gain"))
    for ax in (axes[0, 0], axes[1, 0], axes[1, 2]):
        plotting.log_axis(ax)
    of_series = [
        text.get_text()
        for ax in axes.flat
        if ax.get_legend()
        for text in ax.get_legend().get_texts()
    ]
    plotting.legend_below(figure, axes.flat, without=of_series)
    return figure


def _metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    return frame[frame["metric"] == metric]


def _perturbed_runs(far: Axes, same: Axes, frame: pd.DataFrame) -> None:
    """Distance of directions, and share of equal predictions."""
    start, eps = frame["start"].min(), frame["eps"].max()
    runs = frame[(frame["start"] == start) & (frame["eps"] == eps)]
    kind = "cls" if "cls" in set(runs["tokens"]) else "patches"
    runs = runs[runs["tokens"].isna() | (runs["tokens"] == kind)]
    moved = f"moved by {eps:.2g} after step {int(start)}"
    panels = (
        (
            far,
            "direction_distance",
            f"direction of {_NAMES[kind]}, {moved}",
            "distance of unit vectors",
        ),
        (same, "same_prediction", f"prediction, {moved}", "share as in the clean run"),
    )
    for ax, metric, title, label in panels:
        of_metric = _metric(runs, metric)
        _series(
            ax,
            {
                "random direction": of_metric[of_metric["source"] == "random"],
                "towards another image": of_metric[of_metric["source"] == "partner"],
            },
            title=title,
            label=label,
            null="clean run of another image",
        )


def _series(
    ax: Axes,
    series: Mapping[str, pd.DataFrame],
    *,
    title: str,
    label: str,
    x: str = "step",
    neutral: float | None = None,
    null: str = "permuted weights",
) -> None:
    """One colour per model; full and hollow markers for the two series; nulls in grey.

    `neutral` is a value to mark by a dotted line.
    """
    names = list(dict.fromkeys(name for part in series.values() for name in part["model"]))
    for look, (series_name, part) in zip(_LOOKS, series.items(), strict=True):
        ax.plot([], [], color="0.1", marker="o", markersize=4, label=series_name, **look)
        for i, name in enumerate(names):
            style = plotting.line_style(i) | look
            rows = part[part["model"] == name]
            plotting.line(ax, rows, x, style=style, null="null", null_label=None if i else null)
    for i, name in enumerate(names):
        colour = plotting.line_style(i)["color"]
        ax.plot([], [], color=colour, linewidth=4, label=plotting.label_of(name))
    if neutral is not None:
        ax.axhline(neutral, **plotting.NULL, linestyle=":")
    plotting.step_axis(ax, [step for part in series.values() for step in part[x]])
    plotting.legend(ax, below=True, only=list(series))
    plotting.title(ax, title)
    ax.set_ylabel(label)


def _gains(ax: Axes, gain: pd.DataFrame) -> None:
    """The gain between CLS and patches at step T."""
    gain = gain[gain["source"].isin(_NAMES) & gain["tokens"].isin(_NAMES)]
    pairs = list(dict.fromkeys(zip(gain["source"], gain["tokens"], strict=True)))
    names = list(dict.fromkeys(gain["model"]))
    for i, name in enumerate(names):
        rows = gain[gain["model"] == name].set_index(["source", "tokens"]).reindex(pairs)
        offset = 0.16 * (i - (len(names) - 1) / 2)
        plotting.points(
            ax,
            [position + offset for position in range(len(pairs))],
            rows.assign(low=rows["low"].clip(lower=1e-6)),  # the axis is logarithmic
            style=plotting.line_style(i),
            label=name,
            null="null",
            null_label=None if i else "permuted weights",
        )
    labels = [f"{_NAMES[source]}\nto {_NAMES[read]}" for source, read in pairs]
    ax.set_xticks(range(len(pairs)), labels, fontsize=8)
    ax.set_ylabel("ratio of norms")
    plotting.title(ax, "gain from kind to kind of token, step T")
