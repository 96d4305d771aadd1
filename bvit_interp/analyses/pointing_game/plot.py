"""Figure of `pointing_game`, from its table alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from bvit_interp import plotting

_MOST_MAPS = 3  # models whose heads and strips are drawn; the lines are of all


_HONEST = "best head chosen on one half, scored on the other"


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 4a and 4b over the models; of the first three the head maps of Fig. 10 and the strips of
    Fig. 13."""
    frame = frame.assign(head=frame["head"].astype(str))
    models = list(frame.groupby(["model", "saliency"], sort=False))
    drawn = models[:_MOST_MAPS]
    with_heads = [(key, part) for key, part in drawn if (part["head"] == "mean").any()]
    strips = [
        (key, part)
        for key, part in drawn
        if part["path"].notna().all() and Path(part["path"].iloc[0]).exists()
    ]
    rows = [_examples(part)["image"].shape[0] for _, part in strips]
    heights = (
        [3.5 + 0.2 * (len(models) // 3)]
        + [2.6] * len(with_heads)
        + [0.5 + 0.85 * count for count in rows]
    )
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    panels = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    _plot_lines(next(panels), models)
    for key, part in with_heads:
        _plot_heads(next(panels), key, part)
    for key, part in strips:
        _plot_strip(next(panels), key, part)
    return figure


def _plot_lines(panel: SubFigure, models: list[tuple[Any, pd.DataFrame]]) -> None:
    left, right = panel.subplots(1, 2, sharey=True)
    for i, ((name, saliency), part) in enumerate(models):
        style = plotting.line_style(i)
        heads = set(part["head"])
        label = name if saliency == "attention" else f"{name}, {saliency}"
        _line(left, part[part["head"] == ("mean" if "mean" in heads else "all")], style, label)
        if "best" in heads:
            _line(right, part[part["head"] == "best"], style, label)
            honest = part[part["head"] == "best-split"]
            right.plot(
                honest["step"],
                honest["hit_ratio"],
                color=style["color"],
                linewidth=1,
                alpha=0.8,
                linestyle=":",
                label=None if i else _HONEST,
            )
    nulls = {(part["chance"].iloc[0], part["centre"].iloc[0]) for _, part in models}
    for ax, title in ((left, "mean over heads"), (right, "best head")):
        for i, (chance, centre) in enumerate(sorted(nulls)):
            ax.axhline(chance, **plotting.NULL, label=None if i else "chance: mask area")
            ax.axhline(centre, **plotting.NULL, linestyle="--", label=None if i else "image centre")
        ax.set_title(title, fontsize=10)
        plotting.step_axis(ax, [step for _, part in models for step in part["step"]])
        ax.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("hit ratio")
    handles: dict[str, Any] = {}
    for ax in (left, right):
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    order = sorted(
        handles, key=lambda label: label in ("chance: mask area", "image centre", _HONEST)
    )
    lines = [handles[label] for label in order]  # the models first, then the nulls
    panel.legend(lines, order, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _line(ax: Axes, part: pd.DataFrame, style: dict[str, Any], label: str) -> None:
    ax.plot(part["step"], part["hit_ratio"], **style, label=label)
    ax.fill_between(
        part["step"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0
    )


def _plot_heads(panel: SubFigure, key: tuple[str, str], part: pd.DataFrame) -> None:
    heads = part[part["head"].str.isdigit()].assign(head=lambda f: f["head"].astype(int))
    grid = heads.pivot(index="head", columns="step", values="hit_ratio")
    ax = panel.subplots()
    plotting.heat_map(panel, ax, grid.to_numpy(), list(grid.columns), list(grid.index), "hit ratio")
    ax.set(xlabel="step", ylabel="head", title=key[0])


def _examples(part: pd.DataFrame) -> dict[str, np.ndarray]:
    """The arrays `_keep_examples` wrote for a model."""
    with np.load(part["path"].iloc[0]) as arrays:
        return dict(arrays)


def _plot_strip(panel: SubFigure, key: tuple[str, str], part: pd.DataFrame) -> None:
    """Image, mask outline and the map of the head with the highest score at every step."""
    single = part[part["head"].str.isdigit() | (part["head"] == "all")]
    best = str(single["head"].iloc[int(single["hit_ratio"].argmax())])
    head = int(best) if best.isdigit() else 0
    arrays = _examples(part)
    images, masks, maps = arrays["image"] / 255.0, arrays["mask"], arrays["maps"][:, :, head]
    axes = panel.subplots(len(images), maps.shape[1] + 1, squeeze=False)
    for row, image, mask, steps in zip(axes, images, masks, maps, strict=True):
        plotting.overlay(row[0], image, outline=mask)
        for ax, saliency in zip(row[1:], steps, strict=True):
            plotting.overlay(ax, image, saliency, mask)
    for t, ax in enumerate(axes[0]):
        ax.set_title("image" if t == 0 else f"step {t}", fontsize=8)
    which = f"head {head}" if best.isdigit() else key[1]
    panel.suptitle(f"{key[0]}: {which}", fontsize=10)
