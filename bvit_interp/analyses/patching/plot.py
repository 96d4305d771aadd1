"""Figure of `patching`, from its table alone."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_TITLES = {
    "same": "the image's own",
    "other": "another image's",
    "corrupted": "into a corrupted image",
}


def plot(frame: pd.DataFrame) -> Figure:
    """A column a mode and token set: the cells of each model as a heat map, below them the profile
    by shift.

    Beside whole states of the image's own, those of other modes are left to the table: the same
    runs on another scale.
    """
    recovered = frame[frame["statistic"] == "recovered"]
    whole = (
        (recovered["tokens"] == "all")
        & (recovered["site"] == "resid_post")
        & recovered["unit"].isna()
    )
    if (whole & (recovered["mode"] == "same")).any():
        recovered = recovered[~whole | (recovered["mode"] == "same")]
    names = list(dict.fromkeys(recovered["model"]))
    columns = list(recovered.groupby(["mode", "tokens"], sort=False))
    figure, axes = plotting.canvas(columns=len(columns), rows=len(names) + 1, width=4.0, height=3.0)
    for column, ((mode, _), part) in enumerate(columns):
        moved = f"{_TITLES[mode]}: {_moved(part.iloc[0])}"
        for ax, name in zip(axes[:, column], names, strict=False):
            cells = part[(part["model"] == name) & part["step_from"].notna()]
            matrix = cells.pivot_table(
                index="step_from", columns="step_to", values="value", dropna=False
            )
            plotting.heat_map(
                figure,
                ax,
                matrix.to_numpy(),
                list(map(int, matrix.columns)),
                list(map(int, matrix.index)),
                "share recovered",
                limits=(0, 1),
            )
            ax.set(xlabel="put into step t", ylabel="taken from step s")
            ax.set_title(f"{name}\n{moved}", fontsize=9)
            ax.tick_params(labelsize=7)
        _profile(axes[-1, column], part[part["step_from"].isna()], names)
        axes[-1, column].set_title(f"by shift, mean of cells\n{moved}", fontsize=9)
    plotting.legend(axes[-1, 0])
    return figure


def _moved(row: Any) -> str:
    """What a row moves, in words."""
    site = "state" if row["site"] == "resid_post" else row["site"]
    unit = "" if pd.isna(row["unit"]) else f":{int(row['unit'])}"
    return f"{site}{unit} of {'all tokens' if row['tokens'] == 'all' else row['tokens'].replace('cls', 'CLS')}"


def _profile(ax: Axes, frame: pd.DataFrame, names: list[str]) -> None:
    """What is recovered against the shift, a line a model, its null thin and grey in the model's
    dash."""
    for name, part in frame.groupby("model", sort=False):
        style = plotting.line_style(names.index(name)) | {"markersize": 3}
        ax.plot(part["shift"], part["value"], **style, label=name)
        ax.fill_between(
            part["shift"], part["low"], part["high"], color=style["color"], alpha=0.2, linewidth=0
        )
    for name, part in frame.groupby("model", sort=False):
        dash = plotting.line_style(names.index(name))["linestyle"]
        label = "null: one more image's" if name == names[0] else None
        ax.plot(part["shift"], part["null"], **plotting.NULL, linestyle=dash, label=label)
        ax.fill_between(
            part["shift"], part["null_low"], part["null_high"], color="0.5", alpha=0.15, linewidth=0
        )
    ax.axvline(0, color="0.8", linewidth=0.8)
    ax.set(xlabel="shift t - s, steps", ylabel="share recovered")
