"""Figure of `dynamics`, from its table alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_PANELS = {
    "norm": "norm of a token",
    "step_size": "relative step size",
    "update_cosine": "cosine of successive updates",
    "distance_to_trained": "relative distance to step T",
}
_NAMES = {"cls": "CLS", "reg": "registers", "dist": "distillation", "patches": "patches"}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Movement of each kind of token, one row per kind.

    The last row has the participation ratio, the change of direction, the return distances, and
    linear CKA of all pairs of states.
    """
    models = list(dict.fromkeys(frame["model"]))
    metrics: dict[str, pd.DataFrame] = {str(key): part for key, part in frame.groupby("metric")}
    kinds = [kind for kind in _NAMES if kind in set(metrics["norm"]["tokens"])]
    figure, axes = plotting.canvas(columns=4, rows=len(kinds) + 1, width=3.7, height=2.9)
    for row, kind in zip(axes, kinds, strict=False):
        for ax, (metric, title) in zip(row, _PANELS.items(), strict=True):
            part = metrics.get(metric, frame[:0])
            _by_step(ax, part[part["tokens"] == kind], models)
            plotting.title(ax, f"{_NAMES[kind]}: {title}")
    bottom = axes[-1]
    nothing = frame[:0]
    _by_step(bottom[0], metrics.get("participation_ratio", nothing), models, "isotropic Gaussian")
    bottom[0].set_title("participation ratio", fontsize=10)
    bottom[0].set_ylim(bottom=0)
    change = metrics.get("direction_change", nothing)
    _by_step(bottom[1], change[change["tokens"] == kinds[0]], models)
    bottom[1].set_title(f"{_NAMES[kinds[0]]}: change of direction per step", fontsize=10)
    for ax in axes[:, 1]:
        plotting.log_axis(ax)
    _returns(bottom[2], frame)
    cka = metrics.get("cka", nothing)
    cka = cka[cka["other_model"].isin(models)]  # of a part of the models
    if len(cka):
        _similarities(figure, bottom[3], cka)
    plotting.leave_out_empty(figure, axes)
    plotting.legend_below(figure, [*axes[:-1].flat, *bottom[:2]])
    return figure


def _by_step(ax: Axes, frame: pd.DataFrame, models: list[str], null: str = "another image") -> None:
    """A metric by step: one line per model, its null, and a vertical line at every T."""
    has_null = frame["null"].notna().any()
    for i, model in enumerate(models):
        part = frame[frame["model"] == model]
        if len(part):
            plotting.line(
                ax,
                part,
                "step",
                style=plotting.line_style(i) | {"markevery": 6},
                label=model,
                null="null" if has_null else None,
                null_label=None if model != models[0] else f"null: {null}",
            )
    for trained in sorted(set(frame["trained_steps"])):
        ax.axvline(trained, **plotting.NULL, linestyle="--", label=f"trained for T = {trained}")
    plotting.step_axis(ax, frame["step"])


def _returns(ax: Axes, frame: pd.DataFrame) -> None:
    """Distance to the state p steps before, and of their directions, at the end of the run."""
    tokens = set(frame["tokens"])
    kind = "cls" if "cls" in tokens else "patches"
    returns = frame[(frame["tokens"] == kind) & frame["metric"].str.endswith("return_distance")]
    if returns.empty:  # nothing was run past T
        ax.set_axis_off()
        return
    returns = returns.assign(lag=returns["step"] - returns["other_step"].astype(float))
    labels = {"return_distance": "state", "direction_return_distance": "direction"}
    for i, model in enumerate(dict.fromkeys(frame["model"])):
        for metric, label in labels.items():
            part = returns[(returns["model"] == model) & (returns["metric"] == metric)]
            if len(part):
                look = {} if metric == "return_distance" else {"markerfacecolor": "white"}
                plotting.line(
                    ax,
                    part,
                    "lag",
                    style=plotting.line_style(i) | look,
                    label=None if i else f"{label} of {_NAMES[kind]}",
                    interval=None,
                )
    ax.set(xlabel="lag p, steps", ylim=(0, None))
    ax.set_title("distance to p steps before, at the end", fontsize=10)
    plotting.legend(ax)


def _similarities(figure: Figure, ax: Axes, cka: pd.DataFrame) -> None:
    """CKA of every pair of states as one matrix, models side by side."""
    first = list(zip(cka["model"], cka["step"].astype(int), strict=True))
    second = list(zip(cka["other_model"], cka["other_step"].astype(int), strict=True))
    compared = list(dict.fromkeys(first))
    position = {state: i for i, state in enumerate(compared)}
    values = np.full((len(compared), len(compared)), np.nan)
    for one, other, value in zip(first, second, cka["value"], strict=True):
        i, j = position[one], position[other]
        values[i, j] = values[j, i] = value
    every = 1 if len(compared) <= 14 else 6
    ticks = {i: str(step) for i, (_, step) in enumerate(compared) if step % every == 0}
    steps = [step for _, step in compared]
    plotting.heat_map(figure, ax, values, steps, steps, "linear CKA", numbers=len(compared) <= 6)
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.set_aspect("equal")
    models = [model for model, _ in compared]
    for i in range(1, len(compared)):
        if models[i] != models[i - 1]:
            ax.axhline(i - 0.5, color="white", linewidth=2)
            ax.axvline(i - 0.5, color="white", linewidth=2)
    low, high = cka["null"].min(), cka["null"].max()
    order = "" if len(set(models)) == 1 else ", models in the order of the legend"
    plotting.title(ax, f"CKA of steps{order} (images shuffled: {low:.2f} to {high:.2f})", 9)
    ax.set(xlabel="step", ylabel="step")
    ax.tick_params(labelsize=7)
