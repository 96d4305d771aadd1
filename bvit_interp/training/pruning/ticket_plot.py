"""The figure of a search for tickets: how right, large and alike the subnetworks are, against
sparsity."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_LABELS = {
    "rtl": "routed tickets (RTL)",
    "imp": "one mask, one model (IMP)",
    "multi": "a model a subset (multi-IMP)",
    "random": "routed random masks",
}
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def plot(frame: pd.DataFrame) -> Figure:
    """Balanced accuracy and stored weights of every method, overlap of the masks by layer; nulls
    are grey."""
    figure, axes = plotting.canvas(columns=3, width=4.2, height=3.9)
    right, large, alike = axes[0]
    methods = [method for method in _LABELS if (frame["method"] == method).any()]
    scored = frame[(frame["layer"] == "all") & frame["balanced_accuracy"].notna()].sort_values(
        "sparsity"
    )
    for i, method in enumerate(methods):
        style: dict[str, Any] = {**plotting.line_style(i), "label": _LABELS[method]}
        own = scored[scored["method"] == method]
        whole = own[own["subset"] == "all"]
        spread = (
            own[own["subset"] != "all"].groupby("round")["balanced_accuracy"].agg(["min", "max"])
        )
        spread = spread.reindex(whole["round"])
        place = whole["sparsity"] + 0.004 * (i - (len(methods) - 1) / 2)  # bars beside each other
        right.plot(place, whole["balanced_accuracy"], **style)
        right.vlines(
            place, spread["min"], spread["max"], color=style["color"], linewidth=0.8, alpha=0.7
        )
        large.plot(whole["sparsity"], whole["ratio"], **style)
        if method == "rtl" and whole["swapped"].notna().any():
            swapped = {
                **plotting.NULL,
                "linestyle": "--",
                "label": "RTL under the next subset's mask",
            }
            right.plot(whole["sparsity"], whole["swapped"], **swapped)
    right.axhline(0.5, **plotting.NULL, label="without looking")
    right.set(xlabel="pruned share of a mask", ylabel="mean and range over subsets")
    right.set_title("Balanced accuracy, one class against the rest", fontsize=10)
    large.set(xlabel="pruned share of a mask", ylabel="share of one model's weights", yscale="log")
    low, high = large.get_ylim()
    shares = [share for share in _SHARES if low <= share <= high]
    large.set_yticks(shares, [f"{share:g}" for share in shares])
    large.minorticks_off()
    large.set_title("Weights stored", fontsize=10)
    _overlap(alike, frame)
    plotting.legend(alike)
    figure.legend(
        *right.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


def _overlap(ax: Axes, frame: pd.DataFrame) -> None:
    """Mean overlap of the found masks over layers and in each of them, its null, and where it
    collapses."""
    found = next(
        (method for method in ("rtl", "multi", "random") if (frame["method"] == method).any()), None
    )
    if found is None:
        ax.set_title("No masks of subsets", fontsize=10)
        ax.set_axis_off()
        return
    own = frame[(frame["method"] == found) & (frame["subset"] == "all")].sort_values("round")
    sparsity = own[own["layer"] == "all"].set_index("round")["sparsity"]
    mean = own[own["layer"] == "mean"]
    layers = own[~own["layer"].isin(["all", "mean"])]
    for i, (_, layer) in enumerate(layers.groupby("layer", sort=False)):
        label = "each layer" if i == 0 else None
        thin = {"color": plotting.COLOURS[0], "alpha": 0.25, "linewidth": 0.8}
        ax.plot(layer["round"].map(sparsity), layer["similarity"], label=label, **thin)
    ax.plot(
        mean["round"].map(sparsity),
        mean["similarity"],
        **plotting.line_style(0),
        label="mean of layers",
    )
    ax.plot(
        mean["round"].map(sparsity),
        mean["null_similarity"],
        **plotting.NULL,
        label="independent masks",
    )
    fallen = mean[mean["collapsed"] == 1]
    if len(fallen):
        first = float(sparsity[fallen["round"].iloc[0]])
        ax.axvline(first, color=plotting.COLOURS[1], linestyle=":", label="collapse")
    ax.set(
        xlabel="pruned share of a mask",
        ylabel="mean Jaccard overlap of two subsets",
        ylim=(0, 1.02),
    )
    ax.set_title(f"Overlap of the masks ({found})", fontsize=10)
