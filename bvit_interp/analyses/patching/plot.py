"""Figure of `patching`, from its table alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_SOURCES = {
    "same": "own",
    "other": "another image's",
    "corrupted": "clean image's, in a corrupted one:",
}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """A column per mode and token set: the cells of each model as a heat map, then the mean by
    shift.

    If whole states of mode same are there, whole states of other modes are not drawn: they come
    from the same runs, on another scale.
    """
    recovered = frame[frame["metric"] == "recovered"]
    all_of_state = (
        (recovered["tokens"] == "all")
        & (recovered["site"] == "resid_post")
        & recovered["unit"].isna()
    )
    is_same = recovered["mode"] == "same"
    if (all_of_state & is_same).any():
        recovered = recovered[~all_of_state | is_same]
    models = list(dict.fromkeys(recovered["model"]))
    parts = [part for _, part in recovered.groupby(["mode", "tokens"], sort=False)]
    figure, axes = plotting.canvas(columns=len(parts), rows=len(models) + 1, width=4.0, height=3.0)
    for column, part in zip(axes.T, parts, strict=True):
        title = _title(part)
        for ax, model in zip(column, models, strict=False):
            cells = part[(part["model"] == model) & part["step_from"].notna()]
            _draw_cells(figure, ax, cells)
            plotting.title(ax, f"{model}\n{title}", 9)
        _draw_shifts(column[-1], part[part["step_from"].isna()], models)
        plotting.title(column[-1], f"mean over the cells of a shift\n{title}", 9)
    ends = np.array([ax.get_ylim() for ax in axes[-1]])
    for ax in axes[-1]:  # one scale
        ax.set_ylim(ends.min(), ends.max())
    plotting.legend_below(figure, axes[-1])
    return figure


def _title(part: pd.DataFrame) -> str:
    """The patched activations, in words."""
    row = part.iloc[0]
    site = "state" if row["site"] == "resid_post" else row["site"]
    unit = "" if pd.isna(row["unit"]) else f":{int(row['unit'])}"
    tokens = {"all": "all tokens", "cls": "CLS"}.get(row["tokens"], row["tokens"])
    return f"{_SOURCES[row['mode']]} {site}{unit}, {tokens}"


def _draw_cells(figure: Figure, ax: Axes, cells: pd.DataFrame) -> None:
    table = cells.pivot_table(index="step_from", columns="step_to", values="value", dropna=False)
    columns, rows = ([int(step) for step in steps] for steps in (table.columns, table.index))
    values = table.to_numpy()
    plotting.heat_map(figure, ax, values, columns, rows, "share recovered", limits=(0, 1))
    ax.set(xlabel="put into step t", ylabel="taken from step s")


def _draw_shifts(ax: Axes, frame: pd.DataFrame, models: Sequence[str]) -> None:
    """The share recovered over the shift, a line per model, and its null."""
    for i, model in enumerate(models):
        rows, style = frame[frame["model"] == model], plotting.line_style(i) | {"markersize": 3}
        plotting.line(
            ax,
            rows,
            "shift",
            style=style,
            label=model,
            null="null",
            null_label=None if i else "null: one more image",
            null_interval=("null_low", "null_high"),
        )
    ax.axvline(0, color="0.8", linewidth=0.8)
    ax.set(xlabel="shift t - s, steps", ylabel="share recovered")
