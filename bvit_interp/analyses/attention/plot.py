"""Figure of `attention`, from its table alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from bvit_interp import plotting


def plot(frame: pd.DataFrame) -> Figure:
    """Entropy and distance by step, where CLS looks, agreement of heads, and three models' maps of
    Fig. 13."""
    frame = frame.assign(head=frame["head"].astype(str))
    models = list(frame.groupby("model", sort=False))
    of_cls = [(name, part) for name, part in models if (part["statistic"] == "entropy").any()]
    across = [of_cls[i : i + 3] for i in range(0, len(of_cls), 3)]
    paths = {
        name: Path(part["path"].iloc[0]) for name, part in of_cls[:3] if part["path"].notna().all()
    }
    strips = [(name, np.load(path)) for name, path in paths.items() if path.exists()]
    drawn = [
        (3.5 + 0.2 * (len(models) // 4), _plot_lines, models),
        *((2.7, _plot_masses, some) for some in across),
    ]
    drawn += [(3.9, _plot_agreement, some) for some in across if frame["other_step"].notna().any()]
    drawn += [
        (0.5 + 0.93 * len(arrays["image"]), _plot_strip, (name, arrays)) for name, arrays in strips
    ]
    figure = Figure(figsize=(12, sum(height for height, *_ in drawn)), layout="constrained")
    panels = figure.subfigures(
        len(drawn), 1, height_ratios=[height for height, *_ in drawn], squeeze=False
    )[:, 0]
    for panel, (_, draw, what) in zip(panels, drawn, strict=True):
        draw(panel, *what) if draw is _plot_strip else draw(panel, what)
    return figure


def _over_steps(part: pd.DataFrame, statistic: str, head: str = "mean") -> pd.DataFrame:
    return part[(part["statistic"] == statistic) & (part["head"] == head)].set_index("step")


def _plot_lines(panel: SubFigure, models: list[tuple[str, pd.DataFrame]]) -> None:
    """Mean over heads, with the band between the lowest and the highest head."""
    titles = {
        "entropy_share": "entropy of CLS attention / log N",
        "distance_share": "attention distance / diagonal",
    }
    handles: dict[str, Any] = {}
    for ax, (statistic, title) in zip(panel.subplots(1, 2), titles.items(), strict=True):
        nulls = set()
        for i, (name, part) in enumerate(models):
            mean = _over_steps(part, statistic)
            if not len(mean):  # a model without CLS
                continue
            style = plotting.line_style(i)
            heads = part[(part["statistic"] == statistic) & (part["head"] != "mean")].groupby(
                "step"
            )["value"]
            ax.plot(mean.index, mean["value"], **style, label=name)
            ax.fill_between(
                mean.index, heads.min(), heads.max(), color=style["color"], alpha=0.12, linewidth=0
            )
            nulls |= set(mean["null"].round(6))
            if statistic == "entropy_share":
                rollout = (
                    _over_steps(part, "rollout_entropy")["value"]
                    / _over_steps(part, "entropy")["null"]
                )
                ax.plot(
                    rollout.index,
                    rollout,
                    color=style["color"],
                    linewidth=1,
                    linestyle=":",
                    label=None if i else "of attention rollout",
                )
        for i, null in enumerate(sorted(nulls)):
            ax.axhline(null, **plotting.NULL, label=None if i else "uniform attention")
        ax.set_ylim(0, 1.04 if statistic == "entropy_share" else None)
        _finish(ax, [step for _, part in models for step in part["step"]], title)
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    panel.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )


def _plot_masses(panel: SubFigure, models: list[tuple[str, pd.DataFrame]]) -> None:
    """Attention of CLS stacked by the kind of token it falls on; patches, on top, are cut where
    nothing else is."""
    looks = {
        "cls": ("itself", {"color": "0.25"}),
        "dist": ("distillation token", {"color": "#CC79A7"}),
        "reg": ("registers", {"color": "#E69F00", "hatch": "//", "edgecolor": "white"}),
        "patches": ("patches: the rest, cut", {"color": "#D6E4EE"}),
    }
    axes, top, handles = _row(panel, len(models), sharey=True), 0.0, dict[str, Any]()
    for ax, (name, part) in zip(axes, models, strict=True):
        patches = _over_steps(part, "patches_on_cls")["value"]
        below, cut = 0 * patches, 0.0
        for kind, (label, look) in looks.items():
            share = _over_steps(part, f"cls_on_{kind}")
            if not len(share):
                continue
            ax.bar(
                share.index,
                share["value"],
                bottom=below,
                width=0.9,
                linewidth=0,
                label=f"CLS on {label}",
                **look,
            )
            if kind != "patches":
                below, cut = below + share["value"], cut + share["null"].iloc[0]
                ax.axhline(
                    cut, color="black", linewidth=0.8, linestyle=":", label="uniform attention"
                )
        ax.plot(
            patches.index,
            patches,
            color="#D55E00",
            marker="o",
            markersize=3,
            linewidth=1.2,
            label="patches on CLS",
        )
        top = max(top, 1.3 * cut, 1.3 * patches.max(), 1.3 * below.max())
        _finish(ax, part["step"], name)
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    axes[0].set(ylim=(0, min(top, 1.0)), ylabel="share of attention")
    panel.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=8,
    )


def _plot_agreement(panel: SubFigure, models: list[tuple[str, pd.DataFrame]]) -> None:
    """Above the diagonal a head with itself, below it different heads of the two steps."""
    for ax, (name, part) in zip(_row(panel, len(models)), models, strict=True):
        pairs = part[(part["statistic"] == "agreement") & (part["head"] == "mean")]
        steps = sorted({int(step) for step in part["step"]})
        values = np.eye(len(steps))
        for s, t, same, different in pairs[["step", "other_step", "value", "null"]].to_numpy(float):
            values[steps.index(int(s)), steps.index(int(t))] = same
            values[steps.index(int(t)), steps.index(int(s))] = different
        plotting.heat_map(panel, ax, values, steps, steps, "")
        ax.set(xlabel="step", ylabel="step")
        ax.set_title(name, fontsize=10)
    panel.suptitle(
        "head with itself (above the diagonal), different heads (below): mean correlation",
        fontsize=10,
    )


def _plot_strip(panel: SubFigure, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Each example image and the heads' mean CLS map of every step."""
    images, maps = arrays["image"] / 255.0, arrays["maps"].mean(2)
    axes = panel.subplots(len(images), maps.shape[1] + 1, squeeze=False)
    for row, image, steps in zip(axes, images, maps, strict=True):
        for ax, seen in zip(row, [None, *steps], strict=True):
            plotting.overlay(ax, image, seen)
    for t, ax in enumerate(axes[0]):
        ax.set_title(f"step {t}" if t else "image", fontsize=8)
    panel.suptitle(f"{name}: CLS attention, mean over heads", fontsize=10)


def _row(panel: SubFigure, count: int, **options: Any) -> list[Axes]:
    """`count` axes side by side, at least half a page wide."""
    axes = panel.subplots(1, max(count, 2), **options)
    for ax in axes[count:]:
        ax.set_axis_off()
    return list(axes[:count])


def _finish(ax: Axes, steps: Any, title: str) -> None:
    plotting.step_axis(ax, steps)
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
