"""Figure of `dynamics`, from its table alone."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bvit_interp import plotting

_PANELS = {
    "norm": "norm of a token",
    "step_size": "relative step size",
    "cosine": "cosine of successive updates",
    "to_trained": "relative distance to $z_T$",
}


_NAMES = {"cls": "CLS", "reg": "registers", "dist": "distillation", "patches": "patches"}


def plot(frame: pd.DataFrame) -> Figure:
    """Movement of each kind of token, a row each; below, spread, direction, returns, and linear CKA
    of all states."""
    names = list(dict.fromkeys(frame["model"]))
    kinds = [kind for kind in _NAMES if kind in set(frame["tokens"][frame["statistic"] == "norm"])]
    figure, axes = plotting.canvas(columns=4, rows=len(kinds) + 1, width=3.7, height=2.9)
    for row, kind in zip(axes, kinds, strict=False):
        for ax, (statistic, title) in zip(row, _PANELS.items(), strict=True):
            _lines(ax, frame[(frame["statistic"] == statistic) & (frame["tokens"] == kind)], names)
            ax.set_title(f"{_NAMES[kind]}: {title}", fontsize=10)
    _lines(
        axes[-1, 0], frame[frame["statistic"] == "participation_ratio"], names, "isotropic Gaussian"
    )
    axes[-1, 0].set_title("participation ratio", fontsize=10)
    axes[-1, 0].set_ylim(bottom=0)
    _lines(
        axes[-1, 1],
        frame[(frame["statistic"] == "direction") & (frame["tokens"] == kinds[0])],
        names,
    )
    axes[-1, 1].set_title(f"{_NAMES[kinds[0]]}: change of direction a step", fontsize=10)
    for ax in axes[:, 1]:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
    _returns(axes[-1, 2], frame)
    _similarities(figure, axes[-1, 3], frame[frame["statistic"] == "cka"])
    plotting.legend(axes[0, 0])
    plotting.legend(axes[0, 3])
    plotting.legend(axes[-1, 0])
    return figure


def _lines(ax: Axes, frame: pd.DataFrame, names: list[str], null: str = "another image") -> None:
    """A statistic against step, a line a model, its null thin and grey, and a stroke at every T."""
    models = list(frame.groupby("model", sort=False))
    for name, part in models:
        style = plotting.line_style(names.index(name)) | {"markevery": 6}
        ax.plot(part["step"], part["value"], **style, label=name)
        ax.fill_between(
            part["step"], part["low"], part["high"], color=style["color"], alpha=0.2, linewidth=0
        )
    for i, (_, part) in enumerate(models):
        if part["null"].notna().any():
            ax.plot(
                part["step"], part["null"], **plotting.NULL, label=None if i else f"null: {null}"
            )
    for trained in sorted(set(frame["trained_steps"])):
        ax.axvline(trained, **plotting.NULL, linestyle="--", label=f"trained for T = {trained}")
    plotting.step_axis(ax, frame["step"])


def _returns(ax: Axes, frame: pd.DataFrame) -> None:
    """Distance to the state p steps before, at the end of the run: of the state, and of its
    direction."""
    for i, name in enumerate(dict.fromkeys(frame["model"])):
        of_model = frame[(frame["model"] == name) & frame["tokens"].isin(("cls", "patches"))]
        kind = of_model["tokens"].iloc[0] if len(of_model) else "cls"
        for statistic, filled in (("return", True), ("return_direction", False)):
            part = of_model[(of_model["statistic"] == statistic) & (of_model["tokens"] == kind)]
            style = plotting.line_style(i) | ({} if filled else {"markerfacecolor": "white"})
            label = (
                f"{'state' if filled else 'direction'} of {_NAMES[kind]}"
                if i == 0 and len(part)
                else None
            )
            ax.plot(
                part["step"] - part["other_step"].astype(float), part["value"], **style, label=label
            )
    if not ax.lines or not any(
        len(line.get_xdata()) for line in ax.lines
    ):  # nothing was run past T
        ax.set_axis_off()
        return
    ax.set(xlabel="lag p, steps", ylim=(0, None))
    ax.set_title("distance to p steps before, at the end", fontsize=10)
    plotting.legend(ax)


def _similarities(figure: Figure, ax: Axes, frame: pd.DataFrame) -> None:
    """CKA of every pair of states as one matrix, models side by side."""
    pairs = list(
        zip(frame["model"], frame["step"], frame["other_model"], frame["other_step"], strict=True)
    )
    sets = list(dict.fromkeys((model, int(step)) for model, step, _, _ in pairs))
    place = {each: i for i, each in enumerate(sets)}
    values = np.full((len(sets), len(sets)), np.nan)
    for (model, step, other, other_step), value in zip(pairs, frame["value"], strict=True):
        i, j = place[model, int(step)], place[other, int(other_step)]
        values[i, j] = values[j, i] = value
    every = 1 if len(sets) <= 14 else 3
    ticks = [str(step) if step % every == 0 else "" for _, step in sets]
    plotting.heat_map(figure, ax, values, ticks, ticks, "linear CKA", numbers=len(sets) <= 6)
    ax.set_aspect("equal")
    models = [model for model, _ in sets]
    for i in range(1, len(sets)):
        if models[i] != models[i - 1]:
            ax.axhline(i - 0.5, color="white", linewidth=2)
            ax.axvline(i - 0.5, color="white", linewidth=2)
    names = list(dict.fromkeys(models))
    low, high = frame["null"].min(), frame["null"].max()
    title = textwrap.fill(
        f"CKA of {', '.join(names)} (images shuffled: {low:.2f} to {high:.2f})", 48
    )
    ax.set_title(title, fontsize=8)
    ax.set(xlabel="step", ylabel="step")
    ax.tick_params(labelsize=7)
