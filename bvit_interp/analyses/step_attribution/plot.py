"""Figure of `step_attribution`, from its table alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_METHODS = {
    "magnitude": "|w|",
    "taylor": "|w Σₜ gₜ|",
    "stepwise": "Σₜ |w gₜ|",
    "step_max": "maxₜ |w gₜ|",
    "own_masks": "a mask per step: |w gₜ|",
    "random": "random weights",
    "shifted_masks": "masks of the next step",
}
_NULL_DASHES = {"random": "-", "shifted_masks": "--"}
_LAYERS = ("all", "q", "k", "v", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class _Line:
    """A line over the steps: a layer of a model."""

    model: str
    layer: str
    label: str
    null_label: str | None = None
    """Without it the null is not drawn."""


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Shares by step, cosines and owners of the first model whose steps share weights; norms and
    pruning of all models."""
    names = list(dict.fromkeys(frame["model"]))
    sharing = next(iter(frame.loc[frame["metric"] == "cosine", "model"]), names[0])
    figure, axes = plotting.canvas(
        columns=3, rows=math.ceil((4 + len(names)) / 3), width=4.6, height=4.2
    )
    share, cosine, owner, norm, *pruning = axes.flat
    by_layer = frame[frame["layer"] != "head"]
    _draw_shares(share, by_layer[by_layer["metric"] == "share"], sharing)
    if "cosine" in set(frame["metric"]):
        whole = frame[(frame["model"] == sharing) & (frame["layer"] == "all")]
        _draw_cosines(figure, cosine, whole)
        _draw_owners(owner, by_layer[by_layer["metric"] == "owner"], sharing)
    _draw_norms(norm, by_layer[by_layer["metric"] == "norm"])
    accuracy = frame[frame["metric"] == "accuracy"]
    for ax, name in zip(pruning, names, strict=False):
        _draw_pruning(ax, accuracy[accuracy["model"] == name])
        plotting.title(ax, f"pruned, not retrained: {name}")
    plotting.leave_out_empty(figure, axes)
    return figure


def _draw_shares(ax: Axes, frame: pd.DataFrame, sharing: str) -> None:
    lines = [
        _Line(sharing, layer, layer, "all steps equal" if layer == "all" else None)
        for layer in _LAYERS
    ]
    others = [name for name in dict.fromkeys(frame["model"]) if name != sharing]
    lines += [_Line(name, "all", f"{name}: all") for name in others]
    _draw_by_step(ax, frame, lines)
    plotting.title(ax, f"share of squared gradient: {sharing}")
    plotting.log_axis(ax)
    ax.set_ylim(top=1)


def _draw_owners(ax: Axes, frame: pd.DataFrame, name: str) -> None:
    lines = [
        _Line(name, "all", "weights", "weights, terms shuffled"),
        _Line(name, "neuron", "neurons", "neurons, terms shuffled"),
    ]
    _draw_by_step(ax, frame, lines)
    plotting.title(ax, "owner: share with the largest gₜ² at the step")
    plotting.share_axis(ax)


def _draw_norms(ax: Axes, frame: pd.DataFrame) -> None:
    names = list(dict.fromkeys(frame["model"]))
    lines = [_Line(name, "all", name, "null: by choice of images") for name in names]
    _draw_by_step(ax, frame, lines)
    plotting.title(ax, "norm of the gradient of the block")
    plotting.log_axis(ax)


def _draw_by_step(ax: Axes, frame: pd.DataFrame, lines: list[_Line]) -> None:
    for i, line in enumerate(lines):
        rows = frame[(frame["model"] == line.model) & (frame["layer"] == line.layer)]
        plotting.line(
            ax,
            rows,
            "step",
            style=plotting.line_style(i),
            label=line.label,
            null="null" if line.null_label else None,
            null_label=line.null_label,
        )
    plotting.step_axis(ax, frame["step"])
    plotting.legend(ax, below=True)


def _draw_cosines(figure: Figure, ax: Axes, frame: pd.DataFrame) -> None:
    """Cosines of the whole terms: above the diagonal for the same images, on and below it for
    different ones."""
    tables = {
        metric: rows.pivot(index="step", columns="other_step", values="value")
        for metric in ("cosine", "cosine_apart")
        for rows in [frame[frame["metric"] == metric].astype({"step": int, "other_step": int})]
    }
    above = tables["cosine"]
    table = tables["cosine_apart"].T.combine_first(above)
    values = table.to_numpy(dtype=float).round(2) + 0.0  # no -0.00
    cosines = frame[frame["metric"].isin(["cosine", "cosine_apart"])]
    largest_null = (cosines["null"].abs() + cosines["null_high"] - cosines["null"]).max()
    steps = [int(step) for step in table.columns]
    plotting.heat_map(figure, ax, values, steps, steps, "cosine")
    title = f"cosine of two steps' terms (null within {largest_null:.2g})"
    plotting.title(ax, f"{title}\nlower left: from different images")
    ax.set(xlabel="step", ylabel="step")


def _draw_pruning(ax: Axes, frame: pd.DataFrame) -> None:
    """Accuracy against the share of weights set to zero, by method."""
    whole = frame[frame["method"] == "none"]
    for i, (method, label) in enumerate(_METHODS.items()):
        rows = frame[frame["method"] == method]
        if rows.empty:
            continue
        style: Mapping[str, object] = plotting.line_style(i)
        if method in _NULL_DASHES:
            style = {**plotting.NULL, "linestyle": _NULL_DASHES[method]}
        plotting.line(ax, pd.concat([whole, rows]), "sparsity", style=style, label=label)
    chance = whole["null"].iloc[0]
    ax.axhline(chance, **plotting.NULL, linestyle=":", label="most frequent class")
    ax.set(xlabel="share of matrix weights set to zero", ylabel="accuracy on the other half")
    plotting.share_axis(ax)
    plotting.legend(ax, below=True)
