"""Figure of `attention`, from its table alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from bvit_interp import plotting

Part = tuple[str, pd.DataFrame]
"""A model's name and its rows."""

_PER_ROW = 3  # models side by side; maps are drawn of so many
_LINES = {
    "normalised_entropy": "entropy of CLS attention / log N",
    "normalised_distance": "attention distance / diagonal",
}
_BARS: dict[str, dict[str, Any]] = {
    "cls": {"label": "CLS on itself", "color": "0.25"},
    "dist": {"label": "CLS on distillation token", "color": "#CC79A7"},
    "reg": {
        "label": "CLS on registers",
        "color": "#E69F00",
        "hatch": "//",
        "edgecolor": "white",
    },
    "patches": {"label": "CLS on patches (bar is cut)", "color": "#D6E4EE"},
}

_TO_CLS: dict[str, Any] = {"color": "#D55E00", "marker": "o", "markersize": 3, "linewidth": 1.2}


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Entropy and distance per step, shares of attention, correlations between steps, CLS maps.

    The CLS maps (Fig. 13) are drawn of the first three models, where their files exist.
    """
    frame = frame.assign(head=frame["head"].astype(str))
    models = [(str(name), part) for name, part in frame.groupby("model", sort=False)]
    with_cls = [each for each in models if (each[1]["metric"] == "attention_entropy").any()]
    rows = [with_cls[i : i + _PER_ROW] for i in range(0, len(with_cls), _PER_ROW)]
    top = max((_largest_share(part) for _, part in with_cls), default=1.0)
    panels: list[tuple[float, Callable[[SubFigure], None]]] = [
        (3.5 + 0.2 * (len(models) // 3), partial(_plot_lines, models=models))
    ]
    panels += [(2.7, partial(_plot_shares, models=row, top=top)) for row in rows]
    if frame["other_step"].notna().any():
        panels += [(3.9, partial(_plot_correlations, models=row)) for row in rows]
    for name, part in with_cls[:_PER_ROW]:
        maps = _read_maps(part)
        if maps is not None:
            panels.append(
                (0.5 + 0.93 * len(maps["image"]), partial(_plot_maps, name=name, arrays=maps))
            )
    heights = [height for height, _ in panels]
    figure = plotting.blank(12, sum(heights))
    subfigures = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for subfigure, (_, draw) in zip(subfigures, panels, strict=True):
        draw(subfigure)
    return figure


def _read_maps(part: pd.DataFrame) -> dict[str, np.ndarray] | None:
    """The example maps of a model; None if there are none, or if their file is missing."""
    path = part["path"].iloc[0]
    if not isinstance(path, str) or not Path(path).exists():
        return None
    with np.load(path) as arrays:
        return dict(arrays)


def _rows_of(part: pd.DataFrame, metric: str, head: str = "mean") -> pd.DataFrame:
    return part[(part["metric"] == metric) & (part["head"] == head)].set_index("step")


def _plot_lines(panel: SubFigure, models: list[Part]) -> None:
    """Mean over heads, with a band from the lowest to the highest head."""
    measured = {metric for _, part in models for metric in part["metric"]}
    shown = {metric: title for metric, title in _LINES.items() if metric in measured}
    axes = plotting.subcanvas(panel, columns=len(shown))[0]
    for ax, (metric, title) in zip(axes, shown.items(), strict=True):
        nulls = set()
        for i, (name, part) in enumerate(models):
            mean = _rows_of(part, metric)
            if not len(mean):  # a model without CLS
                continue
            style = plotting.line_style(i)
            heads = part[(part["metric"] == metric) & (part["head"] != "mean")]
            by_step = heads.groupby("step")["value"]
            band = mean.assign(lowest=by_step.min(), highest=by_step.max()).reset_index()
            plotting.line(
                ax,
                band,
                "step",
                style=style,
                label=name,
                interval=("lowest", "highest"),
                interval_label="lowest to highest head",
            )
            nulls |= set(mean["null"].round(6))
            if metric == "normalised_entropy":
                _plot_rollout(ax, part, style["color"], None if i else "entropy of rollout / log N")
        for i, null in enumerate(sorted(nulls)):
            ax.axhline(null, **plotting.NULL, label=None if i else "uniform attention")
        if metric == "normalised_entropy":
            ax.set_ylim(0, 1.04)
        else:
            ax.set_ylim(bottom=max(0, ax.get_ylim()[0]))
        plotting.title(ax, title)
        plotting.step_axis(ax, [step for _, part in models for step in part["step"]])
    plotting.legend_below(panel, axes)


def _plot_rollout(ax: Axes, part: pd.DataFrame, colour: str, label: str | None) -> None:
    """Entropy of the rollout, divided by log N."""
    rollout = _rows_of(part, "rollout_entropy")["value"]
    share = rollout / _rows_of(part, "attention_entropy")["null"]
    ax.plot(share.index, share, color=colour, linewidth=1, linestyle=":", label=label)


def _largest_share(part: pd.DataFrame) -> float:
    """Where the axis of `_plot_shares` may end: above all bars but the patches'."""
    below: pd.Series | float = 0.0
    uniform = 0.0
    for kind in _BARS:
        share = _rows_of(part, f"cls_to_{kind}")
        if kind != "patches" and len(share):
            below, uniform = below + share["value"], uniform + share["null"].iloc[0]
    to_cls = _rows_of(part, "patches_to_cls")["value"]
    return min(1.0, 1.3 * max(uniform, to_cls.max(), pd.Series(below).max()))


def _plot_shares(panel: SubFigure, models: list[Part], top: float) -> None:
    """Attention of CLS, stacked by kind of token; the bars of the patches, on top, are cut.

    `top` is the end of the axis, the same for all models.
    """
    axes = _axes_in_row(panel, len(models), sharey=True)
    for ax, (name, part) in zip(axes, models, strict=True):
        to_cls = _rows_of(part, "patches_to_cls")["value"]
        below, uniform = 0 * to_cls, 0.0
        for kind, look in _BARS.items():
            share = _rows_of(part, f"cls_to_{kind}")
            if not len(share):
                continue
            ax.bar(share.index, share["value"], bottom=below, width=0.9, linewidth=0, **look)
            if kind != "patches":
                below, uniform = below + share["value"], uniform + share["null"].iloc[0]
                ax.axhline(
                    uniform, color="black", linewidth=0.8, linestyle=":", label="uniform attention"
                )
        ax.plot(to_cls.index, to_cls, **_TO_CLS, label="patches on CLS")
        plotting.title(ax, name)
        plotting.step_axis(ax, part["step"])
    axes[0].set(ylim=(0, top), ylabel="share of attention")
    plotting.legend_below(panel, axes)


def _plot_correlations(panel: SubFigure, models: list[Part]) -> None:
    """Above the diagonal a head with itself, below it different heads at the two steps."""
    axes = _axes_in_row(panel, len(models))
    for ax, (name, part) in zip(axes, models, strict=True):
        pairs = part[(part["metric"] == "step_correlation") & (part["head"] == "mean")]
        steps = sorted({int(step) for step in part["step"]})
        values = np.eye(len(steps))
        numbers = pairs[["step", "other_step", "value", "null"]].to_numpy(float)
        for step, other, same_head, different_heads in numbers:
            i, j = steps.index(int(step)), steps.index(int(other))
            values[i, j], values[j, i] = same_head, different_heads
        plotting.heat_map(panel, ax, values, steps, steps, "", limits=(-1, 1))
        ax.set(xlabel="step", ylabel="step")
        plotting.title(ax, name)
    panel.suptitle(
        "mean correlation of CLS maps: same head (above the diagonal), different heads (below)",
        fontsize=10,
    )


def _plot_maps(panel: SubFigure, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Each example image and the CLS map of the heads' mean at every step."""
    images, maps = arrays["image"] / 255.0, arrays["maps"].mean(2)
    axes = panel.subplots(len(images), maps.shape[1] + 1, squeeze=False)
    for row, image, by_step in zip(axes, images, maps, strict=True):
        plotting.overlay(row[0], image)
        for ax, saliency in zip(row[1:], by_step, strict=True):
            plotting.overlay(ax, image, saliency)
    for step, ax in enumerate(axes[0]):
        ax.set_title(f"step {step}" if step else "image", fontsize=8)
    panel.suptitle(f"{name}: CLS attention, mean over heads", fontsize=10)


def _axes_in_row(panel: SubFigure, count: int, **options: Any) -> list[Axes]:
    """`count` axes side by side, each at most half a page wide."""
    axes = plotting.subcanvas(panel, columns=max(count, 2), **options)[0]
    for ax in axes[count:]:
        ax.set_axis_off()
    return list(axes[:count])
