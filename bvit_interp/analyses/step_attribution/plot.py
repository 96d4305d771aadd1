"""Figure of `step_attribution`, from its table alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_TITLES = {
    "magnitude": "$|w|$",
    "taylor": r"$|w\,\Sigma_t g_t|$",
    "stepwise": r"$\Sigma_t |w g_t|$",
    "step_max": r"$\max_t |w g_t|$",
    "own_masks": r"a mask a step: $|w g_t|$",
    "random": "random weights",
    "shifted_masks": "masks of the next step",
}


_DASHES = {"random": "-", "shifted_masks": "--"}  # of nulls


def plot(frame: pd.DataFrame) -> Figure:
    """Shares by step, cosines and owners of the first model whose steps share; norms and pruning of
    all."""
    names = list(dict.fromkeys(frame["model"]))
    own = next(iter(frame["model"][frame["statistic"] == "cosine"]), names[0])
    figure, axes = plotting.canvas(
        columns=3, rows=math.ceil((4 + len(names)) / 3), width=4.6, height=3.7
    )
    others = {f"{name}: all": (name, "all") for name in names if name != own}
    of = dict([*frame[frame["part"] != "head"].groupby("statistic")])
    lines = {part: (own, part) for part in ("all", "q", "k", "v", "proj", "fc1", "fc2")} | others
    _by_step(axes.flat[0], of["share"], lines, {"all": "all steps equal"})
    axes.flat[0].set(title=f"share of squared gradient: {own}", yscale="log", ylim=(None, 20))
    whole = {name: (name, "all") for name in names}
    _by_step(
        axes.flat[3], of["norm"], whole, {name: f"{name}: by choice of images" for name in names}
    )
    axes.flat[3].set(title="norm of the gradient, all of the block", yscale="log")
    if "cosine" in of:
        _cosines(figure, axes.flat[1], frame[(frame["model"] == own) & (frame["part"] == "all")])
        lines = {"weights": (own, "all"), "neurons": (own, "neuron")}
        _by_step(
            axes.flat[2], of["owner"], lines, {unit: f"{unit}, terms shuffled" for unit in lines}
        )
        axes.flat[2].set(
            title="owner: share with their largest $g_t^2$ at the step", ylim=(0, None)
        )
    for ax, name in zip(axes.flat[4:], names, strict=False):
        _curves(ax, frame[(frame["model"] == name) & (frame["statistic"] == "accuracy")])
        ax.set_title(f"pruned, not retrained: {name}")
    for ax in axes.flat:
        ax.title.set_fontsize(10)
        ax.set_visible(ax.has_data())
    return figure


def _line(ax: Axes, x: str, rows: pd.DataFrame, label: str, style: Mapping[str, Any]) -> None:
    """A line with its interval."""
    ax.plot(rows[x], rows["value"], **style, label=label)
    ax.fill_between(
        rows[x], rows["low"], rows["high"], color=style["color"], alpha=0.12, linewidth=0
    )


def _by_step(
    ax: Axes, rows: pd.DataFrame, lines: Mapping[str, tuple[str, str]], nulls: Mapping[str, str]
) -> None:
    """Labelled lines of a model's part against step, some with their null."""
    for i, (label, (name, part)) in enumerate(lines.items()):
        line, style = rows[(rows["model"] == name) & (rows["part"] == part)], plotting.line_style(i)
        _line(ax, "step", line, label, style)
        if label in nulls:
            ax.plot(
                line["step"],
                line["null"],
                **plotting.NULL,
                linestyle=style["linestyle"],
                label=nulls[label],
            )
    plotting.step_axis(ax, rows["step"])
    ax.legend(frameon=False, fontsize=8, ncols=2 if len(lines) > 4 else 1)


def _cosines(figure: Figure, ax: Axes, whole: pd.DataFrame) -> None:
    """Cosines of the whole terms: above the diagonal of the same images, on and below it of
    different ones."""
    above, below = (
        whole[whole["statistic"] == statistic].pivot(
            index="step", columns="other_step", values="value"
        )
        for statistic in ("cosine", "cosine_apart")
    )
    values = below.T.combine_first(above).astype(float).round(2) + 0.0  # no -0.00
    null = whole["null"].abs() + (whole["null_high"] - whole["null"])
    steps = values.columns.astype(int).tolist()
    plotting.heat_map(figure, ax, values.to_numpy(), steps, steps, "cosine")
    ax.set_title(
        f"cosine of two steps' terms (null within {null.max():.2g})\nlower left: of different images",
        fontsize=9,
    )
    ax.set(xlabel="step", ylabel="step")


def _curves(ax: Axes, scored: pd.DataFrame) -> None:
    """Accuracy against the share of weights set to zero, by method."""
    whole = scored[scored["method"] == "none"]
    for i, (method, label) in enumerate(_TITLES.items()):
        rows, null = (
            scored[scored["method"] == method],
            {**plotting.NULL, "linestyle": _DASHES.get(method)},
        )
        style = null if method in _DASHES else plotting.line_style(i)
        if len(rows):
            _line(ax, "sparsity", pd.concat([whole, rows]), label, style)
    ax.axhline(whole["null"].iloc[0], **plotting.NULL, linestyle=":", label="most frequent class")
    ax.set(
        xlabel="share of matrix weights set to zero",
        ylabel="accuracy on the other half",
        ylim=(0, 1.4),
    )
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
