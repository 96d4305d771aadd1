"""Figure of `schedule`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_WHOLE = ("normal", "mean_embedding", "lag", "lead", "delay", "reverse", "twice", "run")
"""Schedules that change all steps."""
_DECODED = {
    "raw": "state",
    "direction": "direction",
    "norm": "norm",
    "subspace": "without subspace",
    "mean": "without mean",
}
"""What the step is decoded from, and its label."""
_NULL_DASHES = {"most frequent class": ":", "a guess": "--"}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy under changed schedules; the decoded step; runs without the step; replaced steps."""
    accuracy = frame[frame["metric"] == "accuracy"]
    schedule, decoding = (
        accuracy[accuracy["experiment"] == experiment] for experiment in ("schedule", "decoding")
    )
    log_prob = frame[frame["metric"] == "log_prob_change"]
    removal = log_prob[log_prob["experiment"] == "removal"]
    matrices = list(log_prob[log_prob["variant"] == "replace"].groupby("model", sort=False))
    columns = max(4, 2 + len(matrices))
    figure, axes = plotting.canvas(columns=columns, rows=2, width=4.4, height=3.6)
    _lines(axes[0, 0], schedule, {"skip": "", "repeat": "repeated"}, "step t skipped or repeated")
    axes[0, 0].set_ylabel("accuracy")
    _lines(axes[0, 1], schedule, {"swap": ""}, "steps t and t + 1 swapped")
    _whole_schedules(axes[0, 2], schedule)
    _decoding(axes[0, 3], decoding)
    random = "random change, as large"
    variants = {"subspace": "", "random_scaled": random}
    _lines(axes[1, 0], removal, variants, "step subspace removed after step t")
    axes[1, 0].set_ylabel("change of true log-probability")
    variants = {"mean": "", "random_shift": random}
    _lines(axes[1, 1], removal, variants, "step mean removed after step t")
    values = log_prob.loc[log_prob["variant"] == "replace", "value"]
    limits = (float(values.min()), float(values.max()))
    for ax, (name, rows) in zip(axes[1, 2:], matrices, strict=False):
        _matrix(figure, ax, name, rows, limits)
    shown = [ax for ax in (*axes[0], *axes[1, :2]) if ax.has_data()]
    plotting.leave_out_empty(figure, axes)
    plotting.legend_below(figure, shown)
    return figure


def _lines(ax: Axes, frame: pd.DataFrame, variants: Mapping[str, str], title: str) -> None:
    """Values over the steps: the first variant filled, the second hollow, or grey if a null."""
    chosen = frame[frame["variant"].isin(variants)]
    for i, (name, rows) in enumerate(chosen.groupby("model", sort=False)):
        for variant, second in variants.items():
            style = plotting.line_style(i) | {"linestyle": "-"}
            label = str(name)
            if second:
                style |= {"linestyle": "--", "markerfacecolor": "white"}
                label = "" if i else second  # once for all models
            if variant.startswith("random"):
                style = plotting.null_style(plotting.line_style(i))
                style |= {"gid": plotting.NULL_MARK}
            own = rows[rows["variant"] == variant]
            plotting.line(ax, own, "step", style=style, label=label or None)
    if chosen["null"].notna().any():
        _null(ax, chosen, "most frequent class")
    plotting.step_axis(ax, chosen["step"])
    plotting.title(ax, title)


def _whole_schedules(ax: Axes, schedule: pd.DataFrame) -> None:
    """Accuracy under each schedule that changes all steps."""
    rows = schedule[schedule["variant"].isin(_WHOLE)]
    numbers = rows["step"].map(lambda step: "" if pd.isna(step) else f" {int(step)}")
    labels = rows["variant"].str.replace("_", " ") + numbers.astype(str)
    order = rows["variant"].map(list(_WHOLE).index)
    _points(ax, rows.assign(label=labels).iloc[order.argsort(kind="stable")])
    _null(ax, rows, "most frequent class")
    plotting.title(ax, "other schedules and numbers of steps")


def _decoding(ax: Axes, decoding: pd.DataFrame) -> None:
    """Accuracy of the decoded step, mean over steps."""
    rows = decoding[decoding["step"].isna()]
    order = rows["variant"].map(list(_DECODED).index)
    rows = rows.assign(label=rows["tokens"] + ": " + rows["variant"].map(_DECODED), order=order)
    _points(ax, rows.sort_values(["tokens", "order"], kind="stable"))
    _null(ax, rows, "a guess")
    plotting.title(ax, "step decoded from held-out tokens")
    ax.set_ylabel("accuracy of the step")


def _points(ax: Axes, frame: pd.DataFrame) -> None:
    """The values of every model, in the colours of `_lines`, at the labels in their order."""
    labels, models = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["model"]))
    for i, name in enumerate(models):
        rows = frame[frame["model"] == name]
        shift = 0.2 * (i - (len(models) - 1) / 2)
        at = [labels.index(label) + shift for label in rows["label"]]
        plotting.points(ax, at, rows, style=plotting.line_style(i))
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)


def _null(ax: Axes, frame: pd.DataFrame, label: str) -> None:
    ax.axhline(frame["null"].max(), **plotting.NULL, linestyle=_NULL_DASHES[label], label=label)
    plotting.share_axis(ax)


def _matrix(
    figure: Figure, ax: Axes, name: object, rows: pd.DataFrame, limits: tuple[float, float]
) -> None:
    """Change of the true log-probability with step s in place of step t; models share colours."""
    whole = rows.astype({"step": int, "other_step": int})
    table = whole.pivot(index="other_step", columns="step", values="value")
    steps, values = list(table.columns), table.to_numpy(dtype=float)
    label = "change of true log-probability"
    plotting.heat_map(figure, ax, values, steps, steps, label, numbers=False, limits=limits)
    ax.set(xlabel="step t", ylabel="step s")
    plotting.title(ax, f"{name}: step s in place of step t")
