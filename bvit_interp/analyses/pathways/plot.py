"""Figure of `pathways`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from bvit_interp import plotting
from bvit_interp.analyses.pathways import ALL_LAYERS, PRUNED, run_of

_LAYERS = {
    "qkv": "qkv (MHSA)",
    "proj": "proj (MHSA)",
    "fc1": "fc1 (FFN, in)",
    "fc2": "fc2 (FFN, out)",
}
_RANDOM = "independent masks"
_SPARSITIES = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_OPEN: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "none"}
_PAPERS_13TH_ROUND = 1 - 0.8**13


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of a panel over sparsity, or a bar for a single model."""

    metric: str
    column: str = "value"
    label: str = ""
    """Without a label the line bears the name of its run."""
    convention: str | None = None
    is_null: bool = False
    """Thin and grey, the same for all runs."""
    change: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the line's style."""

    def rows(self, frame: pd.DataFrame) -> pd.DataFrame:
        chosen = frame[(frame["metric"] == self.metric) & frame["step"].isna()]
        if self.convention is None:
            return chosen
        return chosen[chosen["convention"] == self.convention]

    def style(self, i: int) -> dict[str, Any]:
        return {**(plotting.NULL if self.is_null else plotting.line_style(i)), **self.change}


# from the back to the front
_PANELS: dict[str, tuple[_Line, ...]] = {
    "overlap of two steps: mean Jaccard": (
        _Line(
            metric="jaccard_mean",
            convention="empty=nan",
            column="null",
            label=_RANDOM,
            is_null=True,
        ),
        _Line(
            metric="jaccard_mean",
            convention="empty=1",
            label="empty masks overlap by 1",
            change=_OPEN,
        ),
        _Line(metric="jaccard_mean", convention="empty=nan"),
    ),
    "accuracy": (
        _Line(metric="accuracy", column="null", label="most frequent class", is_null=True),
        _Line(metric="shuffled", label="masks in other orders", change=_OPEN),
        _Line(metric="accuracy"),
    ),
    "weights used by no step": (
        _Line(metric="weight_sparsity", column="null", label=_RANDOM, is_null=True),
        _Line(
            metric="least_weight_sparsity",
            label="least possible",
            is_null=True,
            change={"linestyle": ":"},
        ),
        _Line(
            metric="weight_sparsity",
            column="sparsity",
            label="one mask for all steps",
            is_null=True,
            change={"linestyle": "--"},
        ),
        _Line(metric="weight_sparsity_layer_mean", label="mean of matrices", change=_OPEN),
        _Line(metric="weight_sparsity"),
    ),
}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 14A-D in the first row; Figs. 5a, 14F, 14E and Table 7 in the second; swaps below.

    Lines are over sparsity; the first five panels show the first run only, the last row up to four
    models. A single model is drawn with bars.
    """
    frame = frame.assign(run=frame["model"].map(run_of), density=_density(frame))
    first = frame[frame["run"] == frame["run"].iloc[0]]
    swapped = frame[frame["metric"] == "swapped"]
    figure, axes = plotting.canvas(columns=4, rows=2 if swapped.empty else 3, width=3.8, height=3.3)
    _draw_specialization(figure, list(axes[0]), first[first["metric"] == "specialization"])
    _draw_utilisation(axes[1, 0], first)
    for ax, (title, lines) in zip(axes[1, 1:], _PANELS.items(), strict=True):
        _draw_panel(ax, frame[frame["layer"] == ALL_LAYERS], lines)
        ax.set_title(title, fontsize=10)
        plotting.legend(ax)
    if not swapped.empty:
        for ax, name in zip(axes[2], dict.fromkeys(swapped["model"]), strict=False):
            _draw_swaps(figure, ax, swapped[swapped["model"] == name])
            plotting.title(ax, name)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    return figure


def _density(frame: pd.DataFrame) -> pd.Series:
    """Mask density, for a logarithmic axis: rounds that prune an equal share are equally far
    apart."""
    return (1 - frame["sparsity"]).clip(lower=1e-6)


def _draw_specialization(figure: Figure, axes: Sequence[Axes], frame: pd.DataFrame) -> None:
    """S_t of every step with its null, one panel per layer, on one scale."""
    steps = int(frame["step"].max())
    shades = ListedColormap(
        [colormaps["viridis"](0.92 * t / max(steps - 1, 1)) for t in range(steps)]
    )
    drawn = frame[frame["flag"] != PRUNED]
    top = 1.05  # fully pruned steps are marked at 1
    if len(drawn) == len(frame):
        top = min(top, 1.15 * max(float(drawn[["value", "null"]].max().max()), 0.01))
    for i, (ax, (layer, title)) in enumerate(zip(axes, _LAYERS.items(), strict=True)):
        _draw_layer(ax, frame[frame["layer"] == layer], shades, in_legend=i == 0)
        ax.set(ylim=(0, top))
        plotting.title(ax, f"Sₜ of {title}")
        plotting.legend(ax)
    axes[0].set_ylabel("share of a step's weights\nthat no other step uses")
    colours = ScalarMappable(Normalize(0.5, steps + 0.5), shades)
    figure.colorbar(colours, ax=axes, label="step", pad=0.01, ticks=range(1, steps + 1))


def _draw_layer(ax: Axes, frame: pd.DataFrame, shades: ListedColormap, in_legend: bool) -> None:
    """S_t of every step; a fully pruned step is an open marker at 1."""
    steps, single = int(frame["step"].max()), frame["model"].nunique() == 1
    half = steps // 2
    labels = {1: f"steps 1 to {half}", half + 1: f"steps {half + 1} to {steps}"}
    has_weights = frame[frame["flag"] != PRUNED]
    for step in sorted(set(has_weights["step"].astype(int))):
        rows, colour = has_weights[has_weights["step"] == step], shades(step - 1)
        null_label = _RANDOM if in_legend and step == 1 else None
        if single:
            ax.bar(rows["step"], rows["value"], color=colour)
            null = float(rows["null"].iloc[0])
            ax.plot([step - 0.4, step + 0.4], [null, null], **plotting.NULL, label=null_label)
            continue
        style = {"color": colour, "linestyle": "-" if step <= half else "--"}
        label = labels.get(step) if in_legend else None
        plotting.line(
            ax, rows, "density", "null", style=plotting.NULL, label=null_label, interval=None
        )
        plotting.line(ax, rows, "density", style=style, label=label, interval=None)
    pruned = frame[frame["flag"] == PRUNED]
    if len(pruned):
        ax.scatter(
            pruned["step" if single else "density"],
            [1.0] * len(pruned),
            s=22,
            facecolors="none",
            edgecolors=[shades(int(step) - 1) for step in pruned["step"]],
            label="fully pruned",
        )
    if single:
        plotting.step_axis(ax, frame["step"])
    else:
        _sparsity_axis(ax, frame)


def _draw_utilisation(ax: Axes, frame: pd.DataFrame) -> None:
    """Fig. 5a for the model nearest to the paper's 13th round."""
    frame = frame[(frame["metric"] == "utilisation") & (frame["layer"] == ALL_LAYERS)]
    nearest = (frame["sparsity"] - _PAPERS_13TH_ROUND).abs().to_numpy().argmin()
    rows = frame[frame["model"] == frame["model"].iloc[nearest]]
    ax.bar(rows["uses"], rows["value"], color=plotting.COLOURS[0], label="active weights")
    ax.plot(rows["uses"], rows["null"], **plotting.NULL, marker="_", label=_RANDOM)
    plotting.step_axis(ax, rows["uses"])
    ax.set(xlabel="number of steps that use a weight", ylabel="share of the active weights")
    ax.set_title(f"utilisation at {rows['sparsity'].iloc[0]:.1%} mask sparsity", fontsize=10)
    plotting.legend(ax)


def _draw_panel(ax: Axes, frame: pd.DataFrame, lines: Sequence[_Line]) -> None:
    """Lines of all runs over sparsity; for a single model, bars."""
    if frame["model"].nunique() == 1:
        _draw_bars(ax, frame, lines)
        return
    for line in lines:
        rows = line.rows(frame)
        for i, run in enumerate(dict.fromkeys(frame["run"])):
            label = line.label or run or "the masks"
            has_interval = line.metric == "accuracy" and line.column == "value"
            plotting.line(
                ax,
                rows[rows["run"] == run],
                "density",
                line.column,
                style=line.style(i),
                label=None if line.label and i else label,
                interval=("low", "high") if has_interval else None,
            )
    ax.set_ylim(0, 1.03)
    _sparsity_axis(ax, frame)


def _draw_bars(ax: Axes, frame: pd.DataFrame, lines: Sequence[_Line]) -> None:
    """One horizontal bar per line, labelled with its value."""
    run = frame["run"].iloc[0]
    at = 0
    for line in lines:
        main = not (line.is_null or line.change)
        for value in line.rows(frame)[line.column]:
            name = line.label or run or "the masks"
            ax.text(0.02, at, f"{name}: {value:.3f}", va="center", fontsize=9)
            ax.barh(at, value, color=plotting.COLOURS[5] if main else "0.85")
            at += 1
    ax.set(xlim=(0, 1.03), yticks=[])


def _draw_swaps(figure: Figure, ax: Axes, frame: pd.DataFrame) -> None:
    """Accuracy with the masks of one step used at another."""
    table = frame.astype({"step": int, "other_step": int}).pivot_table(
        index="step", columns="other_step", values="value"
    )
    numbers = frame[["null", "value"]].to_numpy(dtype=float)
    limits = (float(numbers.min()), float(numbers.max()))
    others, steps = list(table.columns), list(table.index)
    plotting.heat_map(figure, ax, table.to_numpy(), others, steps, "accuracy", limits=limits)
    ax.set(xlabel="masks of step", ylabel="used at step")


def _sparsity_axis(ax: Axes, frame: pd.DataFrame) -> None:
    """Density on a logarithmic axis from dense to sparse, labelled as sparsity."""
    most, least = float(frame["density"].max()), float(frame["density"].min())
    ticks = [1 - s for s in _SPARSITIES if least / 1.01 <= 1 - s <= most * 1.01]
    if len(ticks) <= 2:
        ticks = sorted({*frame["density"].round(3)})[:6]
    ax.set(xscale="log", xlim=(most * 1.1, least / 1.1), xlabel="mask sparsity, %")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(lambda density, _: f"{100 * (1 - density):.3g}")
    ax.xaxis.set_minor_locator(NullLocator())
