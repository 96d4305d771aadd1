"""The figure of a ticket search: scores, size and overlap against sparsity."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_LABELS = {
    "rtl": "a mask per subset (RTL)",
    "imp": "one mask, one model (IMP)",
    "multi": "a model per subset (multi-IMP)",
    "random": "random masks (null of RTL)",
}
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_SPARSITY = "pruned share of a mask"


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Balanced accuracy and stored weights of every method, and overlap of the masks by layer.

    Nulls are grey.
    """
    figure, axes = plotting.canvas(columns=3, width=4.2, height=3.9)
    accuracy, size, overlap = axes[0]
    methods = [method for method in _LABELS if (frame["method"] == method).any()]
    scored = frame[(frame["layer"] == "all") & frame["balanced_accuracy"].notna()]
    _accuracy(accuracy, scored, methods)
    _size(size, scored, methods)
    _overlap(overlap, frame)
    plotting.legend(overlap)
    plotting.legend_below(figure, [accuracy])
    return figure


def _accuracy(ax: Axes, scored: pd.DataFrame, methods: Sequence[str]) -> None:
    """Balanced accuracy over all subsets, with the range over subsets as bars beside each other."""
    for i, method in enumerate(methods):
        style = plotting.line_style(i)
        rows = scored[scored["method"] == method]
        each = rows[rows["subset"] != "all"].groupby("round")["balanced_accuracy"]
        whole = rows[rows["subset"] == "all"].set_index("round").sort_values("sparsity")
        whole["shifted"] = whole["sparsity"] + 0.004 * (i - (len(methods) - 1) / 2)
        label = _LABELS[method]
        plotting.line(
            ax, whole, "shifted", "balanced_accuracy", style=style, label=label, interval=None
        )
        low, high = each.min().reindex(whole.index), each.max().reindex(whole.index)
        ax.vlines(whole["shifted"], low, high, color=style["color"], linewidth=0.8, alpha=0.7)
        if method == "rtl" and whole["swapped"].notna().any():
            plotting.line(
                ax,
                whole,
                "sparsity",
                "swapped",
                style={**plotting.NULL, "linestyle": "--"},
                label="RTL with the next subset's mask (null)",
                interval=None,
            )
    ax.axhline(0.5, color="0.45", linewidth=1.0, label="chance")
    ax.set(xlabel=_SPARSITY, ylabel="mean and range over subsets")
    ax.set_title("Balanced accuracy, one-vs-rest", fontsize=10)


def _size(ax: Axes, scored: pd.DataFrame, methods: Sequence[str]) -> None:
    """Weights that each method stores."""
    for i, method in enumerate(methods):
        rows = scored[(scored["method"] == method) & (scored["subset"] == "all")]
        style, label = plotting.line_style(i), _LABELS[method]
        plotting.line(ax, rows, "sparsity", "ratio", style=style, label=label, interval=None)
    ax.set(xlabel=_SPARSITY, ylabel="share of one model's weights", yscale="log")
    low, high = ax.get_ylim()
    shares = [share for share in _TICKS if low <= share <= high]
    ax.set_yticks(shares, [f"{share:g}" for share in shares])
    ax.minorticks_off()
    ax.set_title("Stored weights", fontsize=10)


def _overlap(ax: Axes, frame: pd.DataFrame) -> None:
    """Mean overlap of learned masks in each layer and over layers, its null, and the collapse."""
    learned = [method for method in ("rtl", "multi", "random") if (frame["method"] == method).any()]
    if not learned:
        ax.set_title("No masks of subsets", fontsize=10)
        ax.set_axis_off()
        return
    rows = frame[(frame["method"] == learned[0]) & (frame["subset"] == "all")]
    rows = rows.sort_values("round")
    sparsity = rows[rows["layer"] == "all"].set_index("round")["sparsity"]
    rows = rows.assign(mask_sparsity=rows["round"].map(sparsity))
    layers = rows[~rows["layer"].isin(["all", "mean"])]
    thin = {"color": plotting.COLOURS[0], "alpha": 0.25, "linewidth": 0.8}
    for i, (_, layer) in enumerate(layers.groupby("layer", sort=False)):
        label = "each layer" if i == 0 else None
        plotting.line(
            ax, layer, "mask_sparsity", "similarity", style=thin, label=label, interval=None
        )
    mean = rows[rows["layer"] == "mean"]
    plotting.line(
        ax,
        mean,
        "mask_sparsity",
        "similarity",
        style=plotting.line_style(0),
        label="mean over layers",
        interval=None,
        null="null_similarity",
        null_label="independent masks (null)",
    )
    collapsed = mean.loc[mean["collapsed"] == 1, "mask_sparsity"]
    if len(collapsed):
        ax.axvline(collapsed.iloc[0], color=plotting.COLOURS[1], linestyle=":", label="collapse")
    ax.set(xlabel=_SPARSITY, ylabel="mean Jaccard overlap of two subsets", ylim=(0, 1.02))
    ax.set_title(f"Overlap of the masks ({learned[0]})", fontsize=10)
