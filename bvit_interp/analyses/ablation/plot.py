"""Figure of `ablation`, from its table alone."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.ablation.measure import main_method


def plot(frame: pd.DataFrame) -> Figure:
    """Of one method, mean if it is there: the true class's log-probability at every step and unit
    of each model; the KL of its heads beside random channels; heads ablated from a step on; units
    at all steps beside their single steps.
    """
    method = main_method(frame)
    frame = frame[frame["method"] == method]
    units = frame["unit"].astype("Int64").astype(str)
    frame = frame.assign(name=frame["kind"].map({"head": "head ", "neurons": "group "}) + units)
    there, models = set(frame["statistic"]), list(dict.fromkeys(frame["model"]))
    panels: list[tuple[Any, str | None]] = []
    if "each" in there:
        panels += [(draw, name) for draw in (_draw_map, _draw_profiles) for name in models]
    panels += [(_draw_from, None)] * ("from" in there) + [(_draw_all, None)] * ("all" in there)
    columns = min(max(len(models), 2), len(panels))
    figure, axes = plotting.canvas(columns, math.ceil(len(panels) / columns), width=5.2, height=3.1)
    for ax, (draw, name) in zip(axes.flat, panels, strict=False):
        draw(figure, ax, frame, name)
        ax.title.set_fontsize(10)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(
        f"{method} ablation: change of the true class's log-probability, and KL from the clean answer",
        fontsize=11,
    )
    return figure


def _draw_map(figure: Figure, ax: Axes, frame: pd.DataFrame, name: str) -> None:
    """Every unit at every single step; all models in the same colours."""
    each = _rows(frame, "each", "log_prob")
    table = each[each["model"] == name].pivot(index="name", columns="step", values="value")
    table = table.loc[list(dict.fromkeys(each["name"][each["model"] == name]))]
    limits = (each["value"].min(), each["value"].max())
    steps = [int(step) for step in table.columns]
    plotting.heat_map(figure, ax, table.to_numpy(), steps, list(table.index), "nats", limits=limits)
    ax.set(xlabel="step ablated", title=f"{name}: log-probability, at one step")


def _draw_profiles(figure: Figure, ax: Axes, frame: pd.DataFrame, name: str) -> None:
    """KL of every head at every single step, with its interval, and of the random channels."""
    each = _rows(frame, "each", "kl")
    each = each[each["kind"] == "head"]
    floor = 0.5 * each["value"].clip(lower=1e-9).min()  # an interval may reach below 0
    part = each[each["model"] == name]
    for i, (_, of_head) in enumerate(part.groupby("unit", sort=True)):
        style = plotting.line_style(i)
        ax.plot(of_head["step"], of_head["value"], **style, label=of_head["name"].iloc[0])
        low = of_head["low"].clip(lower=floor)
        ax.fill_between(
            of_head["step"], low, of_head["high"], color=style["color"], alpha=0.12, linewidth=0
        )
    ax.plot(of_head["step"], of_head["null"], **plotting.NULL, label="random channels, as many")
    ax.set(title=f"{name}: KL, a head at one step", ylabel="KL, nats", yscale="log")
    ax.set_ylim(floor, 2 * each[["value", "high"]].max().max())
    plotting.step_axis(ax, part["step"])
    plotting.legend(ax)


def _draw_from(figure: Figure, ax: Axes, frame: pd.DataFrame, name: None) -> None:
    """Every head ablated from a step on: a line a head in the colour of its model."""
    part = _rows(frame, "from", "log_prob")
    part = part[part["kind"] == "head"]
    for i, (model, of_model) in enumerate(part.groupby("model", sort=False)):
        style = plotting.line_style(i) | {"linewidth": 1.0, "markersize": 3}
        shade = {"color": style["color"], "alpha": 0.1, "linewidth": 0}
        for unit, of_head in of_model.groupby("unit"):
            ax.plot(
                of_head["step"],
                of_head["value"],
                **style,
                label=None if unit else f"{model}: each head",
            )
            ax.fill_between(of_head["step"], of_head["low"], of_head["high"], **shade)
        null = plotting.NULL | {"linestyle": style["linestyle"]}
        ax.plot(of_head["step"], of_head["null"], **null, label=f"{model}: random channels")
    ax.set(title="log-probability, a head from the step on", ylabel="nats")
    plotting.step_axis(ax, part["step"])
    plotting.legend(ax)


def _draw_all(figure: Figure, ax: Axes, frame: pd.DataFrame, name: None) -> None:
    """Every unit at all steps, and beside it, open, the sum of its single steps."""
    units = list(dict.fromkeys(_rows(frame, "all", "log_prob")["name"]))
    for i, (model, of_model) in enumerate(frame.groupby("model", sort=False)):
        style = plotting.line_style(i) | {"linestyle": "", "markersize": 5}
        for statistic, shift, word in (
            ("all", 0.0, "all steps"),
            ("sum", 0.12, "sum of single steps"),
        ):
            part = _rows(of_model, statistic, "log_prob")
            if not len(part):
                continue
            x = [units.index(unit) + 0.35 * i - 0.2 + shift for unit in part["name"]]
            face = {} if statistic == "all" else {"markerfacecolor": "white"}
            error = (part["value"] - part["low"], part["high"] - part["value"])
            ax.errorbar(x, part["value"], error, **style | face, label=f"{model}: {word}")
            ax.plot(
                x,
                part["null"],
                "_",
                **plotting.NULL,
                markersize=9,
                label=None if i or shift else "null",
            )
    ax.set_xticks(range(len(units)), [f"{unit[0]}{unit.split()[1]}" for unit in units])
    ax.set(
        title="log-probability, a unit at all steps",
        ylabel="nats",
        xlabel="h: head, g: group of neurons",
    )
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.6 * (high - low), high)  # room for the legend
    plotting.legend(ax)


def _rows(frame: pd.DataFrame, statistic: str, answer: str) -> pd.DataFrame:
    return frame[(frame["statistic"] == statistic) & (frame["answer"] == answer)]
