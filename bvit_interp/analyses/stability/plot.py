"""Figure of `stability`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_NAMES = {"cls": "CLS", "patches": "patches"}


def plot(frame: pd.DataFrame) -> Figure:
    """Stretching by step and along the run, and by kind of token; how far runs perturbed at the
    first start get."""
    figure, axes = plotting.canvas(columns=3, rows=2, width=4.8, height=3.7)
    of: dict[Any, pd.DataFrame] = dict(list(frame.groupby("statistic")))
    horizon = frame["model"].map(of["ftle"].groupby("model")["step"].max())
    first = {key: part[part["index"] == 1] for key, part in of.items()}
    trained = {key: part[part["step"] == horizon[part.index]] for key, part in of.items()}
    moved = frame[(frame["start"] == frame["start"].min()) & (frame["eps"] == frame["eps"].max())]
    kind = "cls" if "cls" in set(moved["tokens"]) else "patches"
    moved = moved[moved["tokens"].isna() | (moved["tokens"] == kind)]
    far, same = (
        {
            label: part[part["statistic"] == key]
            for label, part in (
                ("random direction", moved[moved["source"] == "random"]),
                ("towards another image", moved[moved["source"] == "partner"]),
            )
        }
        for key in ("direction", "same_answer")
    )
    after = f"moved by {moved['eps'].max():.2g} after step {int(moved['start'].min())}"
    local = {"largest singular value": first["singular"], "spectral radius": of["radius"]}
    spectrum = {"worst directions": of["ftle"], "random ones (QR)": trained["exponent"]}
    run = {"of the state": first["exponent"], "less growth of ||z||": first["exponent_relative"]}
    panels: tuple[tuple[str, str, dict[str, pd.DataFrame], str, int | None], ...] = (
        ("Jacobian of each step", "ratio of norms", local, "step", 1),
        ("largest exponents over steps 1..T", "nats a step", spectrum, "index", 0),
        ("first exponent over steps 1..t (QR)", "nats a step", run, "step", 0),
        (f"direction of {_NAMES[kind]}, {after}", "distance of unit vectors", far, "step", None),
        (f"answer, {after}", "share as in the clean run", same, "step", None),
    )
    for ax, (title, label, parts, x, neutral) in zip(axes.flat, panels, strict=False):
        _lines(
            ax,
            parts,
            x,
            "permuted weights" if neutral is not None else "clean run of another image",
        )
        if neutral is not None:
            ax.axhline(neutral, **plotting.NULL, linestyle=":")
        ax.set_title(title, fontsize=10)
        ax.set_ylabel(label)
    for ax in (*axes[:, 0], axes[1, 2]):
        ax.set_yscale("log")
    axes[0, 1].set_xlabel("exponent")
    axes[0, 1].set_ylim(top=1.7 * axes[0, 1].get_ylim()[1])  # room for the legend
    _pairs(axes[1, 2], trained["gain"])
    return figure


def _lines(ax: Axes, parts: Mapping[str, pd.DataFrame], x: str, null: str) -> None:
    """A colour a model, full and hollow markers for the two parts; their nulls in grey."""
    names = list(dict.fromkeys(name for part in parts.values() for name in part["model"]))
    for j, (label, part) in enumerate(parts.items()):
        look = {"markerfacecolor": "white", "linestyle": "--"} if j else {"linestyle": "-"}
        ax.plot([], [], color="0.1", marker="o", markersize=4, **look, label=label)
        for i, name in enumerate(names):
            rows, style = (
                part[part["model"] == name].sort_values(x),
                {**plotting.line_style(i), **look},
            )
            ax.plot(rows[x], rows["value"], **style)
            ax.fill_between(
                rows[x], rows["low"], rows["high"], color=style["color"], alpha=0.15, linewidth=0
            )
            ax.plot(
                rows[x],
                rows["null"],
                **plotting.NULL,
                **look,
                marker=style["marker"],
                markersize=2.5,
            )
    for i, name in enumerate(names):
        ax.plot([], [], color=plotting.line_style(i)["color"], linewidth=4, label=name)
    ax.plot([], [], **plotting.NULL, label=null)
    plotting.step_axis(ax, [step for part in parts.values() for step in part[x]])
    plotting.legend(ax)


def _pairs(ax: Axes, gain: pd.DataFrame) -> None:
    """The gain between CLS and patches at one step."""
    gain = gain[gain["source"].isin(_NAMES) & gain["tokens"].isin(_NAMES)]
    pairs = list(dict.fromkeys(zip(gain["source"], gain["tokens"], strict=True)))
    names = list(dict.fromkeys(gain["model"]))
    for i, name in enumerate(names):
        rows = gain[gain["model"] == name].set_index(["source", "tokens"]).reindex(pairs)
        at = [place + 0.16 * (i - (len(names) - 1) / 2) for place in range(len(pairs))]
        around = [rows["value"] - rows["low"].clip(lower=1e-6), rows["high"] - rows["value"]]
        ax.errorbar(
            at, rows["value"], around, label=name, **plotting.line_style(i) | {"linestyle": "none"}
        )
        ax.plot(
            at,
            rows["null"],
            "_",
            markersize=9,
            color="0.45",
            label=None if i else "permuted weights",
        )
    ax.set_xticks(
        range(len(pairs)),
        [f"{_NAMES[source]}\nto {_NAMES[read]}" for source, read in pairs],
        fontsize=8,
    )
    ax.set_ylabel("ratio of norms")
    ax.set_title("gain from kind to kind of token, step T", fontsize=10)
    plotting.legend(ax)
