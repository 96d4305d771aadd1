"""Figure of `selectivity`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.selectivity import LISTS

_WORDS = {
    "birth": "born last",
    "death": "dies first",
    "role_change": "changes most",
    "stability": "stablest",
}


def plot(frame: pd.DataFrame) -> Figure:
    """Neurons only: selectivity of all, who lives when, how roles change, how reliable profiles
    are; chosen lives."""
    whole = frame.astype({"unit": "Int64", "step": "Int64"})
    models = list(whole[whole["kind"] == "neuron"].groupby("model", sort=False))
    figure, axes = plotting.canvas(columns=3, rows=2, width=4.6, height=3.6)
    _raster(figure, axes[0, 0], models)
    _alive(axes[0, 1], models)
    _spread(axes[0, 2], models, "role_change_ends", "role_change")
    axes[0, 2].set_title("role change, first to last step alive (thin: successive)", fontsize=10)
    axes[0, 2].set_xlabel("1 - r of the profiles")
    _spread(axes[1, 0], models, "reliability")
    axes[1, 0].set_title("reliability of the profile, all neurons", fontsize=10)
    axes[1, 0].set_xlabel("r of two halves of the images")
    name, first = models[0]
    chosen = list(dict.fromkeys(first.loc[first["statistic"] == "class_mean", "unit"]))[
        : len(LISTS)
    ]
    led = first[first["rank"] == 1].set_index("statistic")["unit"]
    said = {
        unit: [f"neuron {unit}", *(_WORDS[key] for key in LISTS if led.get(key) == unit)]
        for unit in chosen
    }
    labels = {unit: ", ".join(words) for unit, words in said.items()}
    _chosen_lives(axes[1, 1], first[first["statistic"] == "selectivity"], labels)
    _chosen_lives(
        axes[1, 2], first[(first["statistic"] == "ablation_logit") & first["step"].notna()], labels
    )
    axes[1, 1].set_title(f"selectivity of chosen neurons, {name}", fontsize=10)
    axes[1, 2].set_title("ablated at one step: true logit", fontsize=10)
    axes[1, 1].axhline(0, **plotting.NULL, linestyle="--", label="permuted labels")
    for ax in axes.flat[1:]:
        plotting.legend(ax)
    return figure


def _raster(figure: Figure, ax: Axes, models: list[tuple[Any, pd.DataFrame]]) -> None:
    """Selectivity of every neuron at every step, by birth and then death, models side by side."""
    ax.grid(visible=False)
    shown, start = list[pd.DataFrame](), 0
    ticks: dict[int, str] = {}
    for name, part in models[:3]:
        of = part[part["unit"].notna()]
        table = of[of["statistic"] == "selectivity"].pivot(
            index="unit", columns="step", values="value"
        )
        life = of[of["statistic"].isin(("birth", "death"))].pivot(
            index="unit", columns="statistic", values="value"
        )
        order = life.assign(peak=-table.max(axis=1)).sort_values(["birth", "death", "peak"]).index
        shown += [table.loc[order].reset_index(drop=True), pd.DataFrame({"gap": [float("nan")]})]
        ticks |= {
            start + t - 1: str(t)
            for t in table.columns
            if t % 4 == 0 or t in (1, len(table.columns))
        }
        ax.text(
            start + (len(table.columns) - 1) / 2,
            -0.01 * len(table),
            name,
            ha="center",
            va="bottom",
            fontsize=7,
        )
        start += len(table.columns) + 1
    matrix = pd.concat(shown[:-1], axis=1).to_numpy(float)
    image = ax.imshow(matrix, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set(xlabel="step", ylabel="neurons, by birth and death")
    ax.set_title("selectivity of every neuron\n", fontsize=10)
    figure.colorbar(image, ax=ax, label="debiased $\\eta^2$", shrink=0.9)


def _alive(ax: Axes, models: list[tuple[Any, pd.DataFrame]]) -> None:
    """Share of neurons alive at each step, and as bars those born, and below zero those that died
    after it."""
    for i, (name, part) in enumerate(models):
        style = plotting.line_style(i)
        alive = part[part["statistic"] == "alive"]
        ax.plot(alive["step"], alive["value"], **style, label=name)
        ax.fill_between(
            alive["step"], alive["low"], alive["high"], color=style["color"], alpha=0.2, linewidth=0
        )
        ax.plot(
            alive["step"],
            alive["null"],
            **plotting.NULL,
            label=None if i else "alive by random groups",
        )
        for key, sign in (("birth", 1), ("death", -1)):
            steps = part.loc[(part["statistic"] == key) & part["unit"].notna(), "value"].dropna()
            counts = (
                steps[(steps < alive["step"].max()) | (sign > 0)].value_counts()
                * sign
                / alive["n"].iloc[0]
            )
            place = counts.index + 0.3 * (i - (len(models) - 1) / 2)
            ax.bar(place, counts, width=0.3, color=style["color"], alpha=0.6)
    plotting.step_axis(ax, models[0][1]["step"].dropna())
    ax.set_ylabel("share of neurons")
    ax.set_title("alive (bars: born, and below 0 last alive)", fontsize=10)


def _spread(
    ax: Axes, models: list[tuple[Any, pd.DataFrame]], key: str, thin: str | None = None
) -> None:
    """How a statistic is spread over a model's neurons, as cumulative shares, and its null; another
    as thin lines."""
    for i, (name, part) in enumerate(models):
        plain = plotting.line_style(i) | {"marker": ""}
        lines = (
            (thin, "value", {"linewidth": 0.8}),
            (key, "null", plotting.NULL),
            (key, "value", {"label": name}),
        )
        for statistic, column, look in lines:
            values = (
                part.loc[(part["statistic"] == statistic) & part["unit"].notna(), column]
                .dropna()
                .sort_values()
            )
            shares = [(place + 1) / len(values) for place in range(len(values))]
            ax.plot(values, shares, **{**plain, **look})  # type: ignore[dict-item]
    ax.plot([], [], **plotting.NULL, label="null: next neuron's")
    ax.set(ylabel="share of neurons", ylim=(0, 1.02))


def _chosen_lives(ax: Axes, frame: pd.DataFrame, labels: Mapping[int, str]) -> None:
    for i, (unit, label) in enumerate(labels.items()):
        part, style = frame[frame["unit"] == unit], plotting.line_style(i)
        ax.plot(part["step"], part["value"], **style, label=label)
        ax.fill_between(
            part["step"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0
        )
        if part["statistic"].iloc[0] != "selectivity":
            ax.plot(
                part["step"], part["null"], **plotting.NULL, label=None if i else "other neurons"
            )
    plotting.step_axis(ax, frame["step"])
