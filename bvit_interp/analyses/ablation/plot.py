"""Figure of `ablation`, from its table alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.ablation import drawn_method

_FLOOR = 1e-9  # nats
_UNITS = {"z": "head", "mlp_post": "group"}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Panels of one method (mean if it is there), by scope.

    Each unit at each single step: the change of log-probability, one panel per model. Each head at
    each single step: KL beside random channels and beside random directions, one panel per model.
    Each head ablated from a step on. Each unit at all steps, beside the sum of its single steps.
    """
    method = drawn_method(list(frame["method"]))
    frame = frame[frame["method"] == method]
    unit = frame["unit"].astype("Int64").astype(str)
    frame = frame.assign(name=frame["site"].map(_UNITS) + " " + unit)
    scopes, models = set(frame["scope"]), list(dict.fromkeys(frame["model"]))
    panels: list[Callable[[Figure, Axes], None]] = []
    if "each" in scopes:
        panels += [_map_panel(frame, model) for model in models]
        panels += [_profile_panel(frame, model) for model in models]
    if "from" in scopes:
        panels.append(_from_panel(frame))
    if "all" in scopes:
        panels.append(_all_panel(frame))
    columns = min(max(len(models), 2), len(panels))
    figure, axes = plotting.canvas(columns, math.ceil(len(panels) / columns), width=5.2, height=3.5)
    for ax, draw in zip(axes.flat, panels, strict=False):
        draw(figure, ax)
    plotting.leave_out_empty(figure, axes)
    figure.suptitle(f"{method} ablation: change from the clean answer", fontsize=11)
    return figure


def _map_panel(frame: pd.DataFrame, model: str) -> Callable[[Figure, Axes], None]:
    """Log-probability for each unit at each single step; all models share the colours."""
    each = _rows(frame, "each", "log_prob")
    limits = (each["value"].min(), each["value"].max())
    rows = each[each["model"] == model]
    table = rows.pivot(index="name", columns="step", values="value")
    table = table.loc[list(dict.fromkeys(rows["name"]))]
    steps = [int(step) for step in table.columns]

    def draw(figure: Figure, ax: Axes) -> None:
        names, label = list(table.index), "change of log-probability, nats"
        plotting.heat_map(figure, ax, table.to_numpy(), steps, names, label, limits=limits)
        ax.set_xlabel("ablated step")
        plotting.title(ax, f"{model}: one unit at one step")

    return draw


def _profile_panel(frame: pd.DataFrame, model: str) -> Callable[[Figure, Axes], None]:
    """KL of each head at each single step, with its interval, beside two nulls.

    Of random directions, the geometric mean over heads.
    """
    kl = _rows(frame, "each", "kl")
    kl = kl[kl["site"] == "z"]
    is_matched = "norm_null" in kl and kl["norm_null"].notna().any()  # older tables have none
    shown = ["value", "norm_null"] if is_matched else ["value"]
    floor = 0.5 * kl[shown].clip(lower=_FLOOR).min().min()  # an interval may reach below 0
    top = 2 * kl[[*shown, "high"]].max().max()
    rows = kl[kl["model"] == model].assign(low=kl["low"].clip(lower=floor))

    def draw(figure: Figure, ax: Axes) -> None:
        heads = [head for _, head in rows.groupby("unit", sort=True)]
        for i, head in enumerate(heads):
            plotting.line(
                ax, head, "step", style=plotting.line_style(i), label=head["name"].iloc[0]
            )
        if not heads:
            return
        ax.plot(heads[0]["step"], heads[0]["null"], **plotting.NULL, label="null: random channels")
        if is_matched:
            logs = np.log(rows["norm_null"].clip(lower=_FLOOR)).groupby(rows["step"]).mean()
            dashed = plotting.NULL | {"linestyle": "--", "gid": plotting.NULL_MARK}
            ax.plot(logs.index, np.exp(logs), **dashed, label="null: random direction")
        plotting.title(ax, f"{model}: one head at one step")
        ax.set_ylabel("KL, nats")
        plotting.log_axis(ax)
        ax.set_ylim(floor, top)
        plotting.step_axis(ax, rows["step"])
        ax.set_xlabel("ablated step")
        plotting.legend(ax, below=True)

    return draw


def _from_panel(frame: pd.DataFrame) -> Callable[[Figure, Axes], None]:
    """Log-probability for each head ablated from a step on, in the colour of its model."""
    rows = _rows(frame, "from", "log_prob")
    rows = rows[rows["site"] == "z"]

    def draw(figure: Figure, ax: Axes) -> None:
        for i, (model, part) in enumerate(rows.groupby("model", sort=False)):
            style = plotting.line_style(i) | {"linewidth": 1.0, "markersize": 3}
            for j, (_, head) in enumerate(part.groupby("unit")):
                is_first = j == 0
                plotting.line(
                    ax,
                    head,
                    "step",
                    style=style,
                    label=f"{model}: each head" if is_first else None,
                    null="null" if is_first else None,
                    null_label="null: random channels" if is_first and i == 0 else None,
                )
        plotting.title(ax, "one head, from a step on")
        ax.set_ylabel("change of log-probability, nats")
        plotting.step_axis(ax, rows["step"])
        ax.set_xlabel("first ablated step")
        plotting.legend(ax, below=True)

    return draw


def _all_panel(frame: pd.DataFrame) -> Callable[[Figure, Axes], None]:
    """Log-probability for each unit at all steps and, hollow, the sum of its single steps."""
    units = list(dict.fromkeys(_rows(frame, "all", "log_prob")["name"]))
    scopes = (("all", 0.0, "all steps"), ("sum", 0.12, "sum of single steps"))

    def draw(figure: Figure, ax: Axes) -> None:
        for i, (model, part) in enumerate(frame.groupby("model", sort=False)):
            style = plotting.line_style(i) | {"markersize": 5}
            for scope, shift, words in scopes:
                rows = _rows(part, scope, "log_prob")
                if not len(rows):
                    continue
                plotting.points(
                    ax,
                    [units.index(unit) + 0.35 * i - 0.2 + shift for unit in rows["name"]],
                    rows,
                    style=style if scope == "all" else style | {"markerfacecolor": "white"},
                    label=f"{model}: {words}",
                    null="null",
                    null_label="null" if i == 0 and scope == "all" else None,
                )
        ax.set_xticks(range(len(units)), [f"{unit[0]}{unit.split()[1]}" for unit in units])
        ax.axhline(0, color="0.8", linewidth=0.8)
        ax.set(ylabel="change of log-probability, nats", xlabel="h: head, g: group of neurons")
        plotting.title(ax, "one unit at all steps (bars: 95 % interval)")
        plotting.legend(ax, below=True)

    return draw


def _rows(frame: pd.DataFrame, scope: str, metric: str) -> pd.DataFrame:
    return frame[(frame["scope"] == scope) & (frame["metric"] == metric)]
