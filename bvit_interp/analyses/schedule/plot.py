"""Figure of `schedule`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_WHOLE = ("normal", "mean_row", "lag", "lead", "delay", "reverse", "again", "run")


_READ = {
    "raw": "state",
    "direction": "direction",
    "norm": "norm",
    "subspace": "less subspace",
    "mean": "less mean",
}


def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy under changed schedules; the step read off a state; runs without it; step s in the
    place of t."""
    exact, put = frame[frame["measure"] == "accuracy"], frame[frame["kind"] == "put"]
    schedule, read = (exact[exact["part"] == part] for part in ("schedule", "reading"))
    removal = frame[(frame["part"] == "removal") & (frame["measure"] == "log_prob")]
    maps = list(put[put["measure"] == "log_prob"].groupby("model", sort=False))
    figure, axes = plotting.canvas(columns=max(4, 2 + len(maps)), rows=2, width=4.4, height=3.6)
    _lines(axes[0, 0], schedule, {"skip": "", "repeat": "repeated"}, "step t skipped or repeated")
    _lines(axes[0, 1], schedule, {"swap": ""}, "steps t and t + 1 swapped")
    whole = schedule[schedule["kind"].isin(_WHOLE)]
    places = zip(
        whole["kind"].str.replace("_", " "), whole["step"].fillna(0).astype(int), strict=True
    )
    whole = whole.assign(label=[f"{kind} {step or ''}".strip() for kind, step in places])
    _points(axes[0, 2], whole, "other clocks and numbers of steps")
    read = read[read["step"].isna()]
    read = read.assign(label=read["tokens"] + ": " + read["kind"].map(_READ))
    _points(axes[0, 3], read, "step read off held-out tokens")
    _lines(
        axes[1, 0],
        removal,
        {"subspace": "", "random_scaled": "random, as far"},
        "step subspace out after step t",
    )
    _lines(
        axes[1, 1],
        removal,
        {"mean": "", "random_shift": "random, as far"},
        "step mean out after step t",
    )
    for ax, (name, part) in zip(axes[1, 2:], maps, strict=False):
        table = part.astype({"step": int, "other": int}).pivot(
            index="other", columns="step", values="value"
        )
        values, steps = table.to_numpy(dtype=float), [*table.columns]
        plotting.heat_map(
            figure, ax, values, steps, steps, "change of true log-probability", numbers=False
        )
        ax.set(xlabel="place t", ylabel="step s")
        ax.set_title(f"{name}: step s at place t", fontsize=10)
    for ax, label in (
        (axes[0, 0], "accuracy"),
        (axes[0, 3], "read right"),
        (axes[1, 0], "change of true log-prob."),
    ):
        ax.set_ylabel(label)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    return figure


def _lines(ax: Axes, frame: pd.DataFrame, kinds: Mapping[str, str], title: str) -> None:
    """Values against the step: the first kind in full, the second hollow and dashed, or thin and
    grey if a null."""
    frame = frame[frame["kind"].isin(kinds)]
    for i, (name, of_model) in enumerate(frame.groupby("model", sort=False)):
        for kind, label in kinds.items():
            part = of_model[of_model["kind"] == kind]
            steps, value, low, high = (
                part[key].astype(float) for key in ("step", "value", "low", "high")
            )
            second = (
                {"linestyle": "--", "markerfacecolor": "white"} if label else {"linestyle": "-"}
            )
            null = plotting.NULL | {"marker": ""} if kind.startswith("random") else {}
            style = plotting.line_style(i) | second | null
            ax.plot(steps, value, **style, label=name if not label else None if i else label)
            ax.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    if frame["null"].notna().any():
        ax.axhline(frame["null"].max(), **plotting.NULL, linestyle=":", label="most frequent class")
        ax.set_ylim(0, 1)
    plotting.step_axis(ax, frame["step"])
    ax.set_title(title, fontsize=10)
    plotting.legend(ax)


def _points(ax: Axes, frame: pd.DataFrame, title: str) -> None:
    """Accuracy of every model, in the colours of `_lines`, at every label, with intervals and the
    null."""
    frame = frame.assign(place=frame["kind"].map([*_WHOLE, *_READ].index)).sort_values(
        ["tokens", "place"]
    )
    labels, models = list(dict.fromkeys(frame["label"])), list(frame.groupby("model", sort=False))
    for i, (_, part) in enumerate(models):
        x = [labels.index(label) + 0.2 * (i - (len(models) - 1) / 2) for label in part["label"]]
        errors = [
            (part["value"] - part["low"]).clip(lower=0),
            (part["high"] - part["value"]).clip(lower=0),
        ]
        ax.errorbar(
            x,
            part["value"],
            yerr=errors,
            **plotting.line_style(i) | {"linestyle": "", "linewidth": 1.0},
        )
    ax.axhline(frame["null"].max(), **plotting.NULL, linestyle=":", label="null")
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    ax.set_ylim(0, 1)
    ax.set_title(title, fontsize=10)
    plotting.legend(ax)
