"""Figure of `circuits`, from its table alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.circuits import LABELS, Method

_NULLS = {"random": "-", "even-random": "--", "same-random": ":"}


def plot(frame: pd.DataFrame) -> Figure:
    """KL against size by condition, a panel a model, and accuracy; below, the gates at one size,
    and their overlap."""
    methods = [name for name in get_args(Method) if name in set(frame["method"])]
    models, effects = list(dict.fromkeys(frame["model"])), frame[frame["step"] == "all"]
    figure, axes = plotting.canvas(len(models) + 1, 2, width=4.6, height=3.6)
    size = sorted(set(frame["fraction"]) - {1.0})[(frame["fraction"].nunique() - 1) // 2]
    steps = frame[
        (frame["kind"] != "all") & (frame["method"] == methods[-1]) & (frame["fraction"] == size)
    ]
    for (top, below), name in zip(axes.T, models, strict=False):
        _draw_conditions(
            top, effects[(effects["model"] == name) & (effects["method"] == methods[-1])]
        )
        top.set_title(f"{name}: {methods[-1]} gates", fontsize=10)
        _draw_gates(below, steps[steps["model"] == name])
        below.set_title(f"open gates, {size:.0%} of each kind", fontsize=10)
    _draw_accuracy(axes[0, -1], effects, methods)
    _draw_overlap(axes[1, -1], steps[steps["kind"] == "neuron"], models)
    lines = {"loc": "outside upper center", "ncols": 4, "frameon": False, "fontsize": 8}
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **lines)
    return figure


def _draw_conditions(ax: Axes, frame: pd.DataFrame) -> None:
    for i, (condition, label) in enumerate(LABELS.items()):
        part, style = (
            frame[frame["condition"] == condition].sort_values("fraction"),
            plotting.line_style(i),
        )
        style = plotting.NULL | {"linestyle": _NULLS[condition]} if condition in _NULLS else style
        ax.plot(part["fraction"], part["kl"], **style, label=label)
        ax.fill_between(
            part["fraction"],
            part["kl_low"],
            part["kl_high"],
            color=style["color"],
            alpha=0.2,
            linewidth=0,
        )
    ax.set(xlabel="share of gates open", ylabel="KL to the whole model, nats", ylim=(0, None))
    ax.set_xticks(sorted(set(frame["fraction"])))


def _draw_gates(ax: Axes, frame: pd.DataFrame) -> None:
    """A raster of steps by units: open gates dark, heads before the groups of neurons."""
    head, neuron = (
        np.array([[each == "#" for each in gates] for gates in part["gates"]])
        for _, part in frame.groupby("kind")
    )
    raster, heads = np.concatenate([head, neuron], axis=1), head.shape[1]
    ax.grid(visible=False)
    ax.imshow(raster.T, aspect="auto", cmap="Greys", vmax=1.4, interpolation="nearest")
    ax.axhline(heads - 0.5, color=plotting.COLOURS[1], linewidth=1.5)
    ax.set(xticks=range(len(raster)), xticklabels=range(1, len(raster) + 1), xlabel="step")
    middles = [(heads - 1) / 2, (heads + raster.shape[1] - 1) / 2]
    ax.set_yticks(middles, ["heads", "neuron groups"], rotation=90, va="center", fontsize=8)


def _draw_accuracy(ax: Axes, effects: pd.DataFrame, methods: Sequence[str]) -> None:
    circuits = effects[effects["condition"].isin(("per-step", "full"))]
    for (i, (name, of_model)), method in itertools.product(
        enumerate(circuits.groupby("model", sort=False)), methods
    ):
        is_last = method == methods[-1]
        part = of_model[of_model["method"].isin((method, "none"))].sort_values("fraction")
        style = plotting.line_style(i) | ({} if is_last else {"markerfacecolor": "white"})
        ax.plot(part["fraction"], part["accuracy"], **style, label=name if is_last else None)
        ax.fill_between(
            part["fraction"],
            part["low"],
            part["high"],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
    ax.axhline(effects["chance"].iloc[0], **plotting.NULL)
    ax.annotate(
        "null: most frequent class",
        (1, effects["chance"].iloc[0] - 0.01),
        ha="right",
        va="top",
        fontsize=8,
    )
    ax.set(xlabel="share of gates open", ylabel="accuracy", ylim=(0, 1))
    ax.set_title(
        f"accuracy of the circuits{' (hollow: gradient)' * (len(methods) - 1)}", fontsize=10
    )
    plotting.legend(ax)


def _draw_overlap(ax: Axes, frame: pd.DataFrame, models: Sequence[str]) -> None:
    for i, name in enumerate(models):
        part, style = frame[frame["model"] == name], plotting.line_style(i)
        steps = part["step"].astype(int)
        ax.plot(steps, part["overlap"], **style, label=name)
        null = style | plotting.NULL | {"marker": "", "label": None if i else "null: random gates"}
        ax.plot(steps, part["overlap_null"], **null)
        ax.fill_between(
            steps,
            part["overlap_null_low"],
            part["overlap_null_high"],
            color="0.5",
            alpha=0.2,
            linewidth=0,
        )
    ax.set(ylabel="mean Jaccard overlap", ylim=(0, 1))
    ax.set_title("neuron groups shared with other steps", fontsize=10)
    plotting.step_axis(ax, frame["step"].astype(int))
    plotting.legend(ax)
