"""Figure of `pointing_game`, from its table alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from bvit_interp import plotting

_MOST_MAPS = 3  # models whose heads and maps are drawn; the lines are of all
_SPLIT = "best head of one half, scored on the other"
_NULLS = {
    "chance": "area of the object",
    "centre_hit_ratio": "image centre",
    "luminance_hit_ratio": "brightest patch",
    "contrast_hit_ratio": "patch of most contrast",
}
_UNTRAINED = "random weights"
_OTHERS_DASH = (0, (1, 3))


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """Hit ratios of all models (Fig. 4); heads (Fig. 10) and maps (Fig. 13) of the first three."""
    frame = frame.assign(head=frame["head"].astype(str))
    by_model = frame.groupby(["model", "saliency"], sort=False)
    models = [(str(name), str(saliency), part) for (name, saliency), part in by_model]
    panels: list[tuple[float, Callable[[SubFigure], None]]] = [
        (3.5 + 0.2 * (len(models) // 3), partial(_plot_lines, models=models))
    ]
    with_heads = [(name, part) for name, _, part in models[:_MOST_MAPS] if _has_heads(part)]
    ratios = [part.loc[part["head"].str.isdigit(), "hit_ratio"] for _, part in with_heads]
    limits = (min(map(min, ratios), default=0.0), max(map(max, ratios), default=1.0))
    for name, part in with_heads:
        panels.append((2.6, partial(_plot_heads, name=name, part=part, limits=limits)))
    for name, saliency, part in models[:_MOST_MAPS]:
        examples = _read_examples(part)
        if examples is not None:
            strip = partial(_plot_maps, name=name, saliency=saliency, part=part, examples=examples)
            panels.append((0.5 + 0.85 * len(examples["image"]), strip))
    heights = [height for height, _ in panels]
    figure = plotting.blank(11, sum(heights))
    subfigures = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for subfigure, (_, draw) in zip(subfigures, panels, strict=True):
        draw(subfigure)
    return figure


def _has_heads(part: pd.DataFrame) -> bool:
    return bool(part["head"].str.isdigit().any() and (part["head"] == "mean").any())


def _read_examples(part: pd.DataFrame) -> dict[str, np.ndarray] | None:
    """The example maps of a model; None if there are none, or if their file is missing."""
    path = part["path"].iloc[0]
    if not isinstance(path, str) or not Path(path).exists():
        return None
    with np.load(path) as arrays:
        return dict(arrays)


def _plot_lines(panel: SubFigure, models: list[tuple[str, str, pd.DataFrame]]) -> None:
    """The mean over heads, its gain and the best head, with the nulls of each."""
    parts = [part for *_, part in models]
    axes = plotting.subcanvas(panel, columns=2 + any(map(_has_heads, parts)))[0]
    ratio, gain = axes[:2]
    for i, (name, saliency, part) in enumerate(models):
        style = plotting.line_style(i)
        label = name if saliency == "attention" else f"{name}, {saliency}"
        mean = part[part["head"].isin(["mean", "all"])]
        of_mean: dict[str, Any] = {"style": style, "label": label, "null_label": _UNTRAINED}
        plotting.line(ratio, mean, "step", "hit_ratio", **of_mean, null="untrained_hit_ratio")
        plotting.line(
            gain,
            mean,
            "step",
            "gain",
            **of_mean,
            interval=("gain_low", "gain_high"),
            null="untrained_gain",
        )
        best, split = (part[part["head"] == head] for head in ("best", "best-split"))
        if len(best):
            plotting.line(axes[2], best, "step", "hit_ratio", style=style, label=label)
            thin = {"color": style["color"], "linewidth": 1, "linestyle": ":", "alpha": 0.8}
            split_label = None if i else _SPLIT
            plotting.line(
                axes[2], split, "step", "hit_ratio", style=thin, label=split_label, interval=None
            )
    for ax in (ratio, *axes[2:]):
        for (column, label), dash in zip(_NULLS.items(), plotting.DASHES, strict=True):
            for i, null in enumerate(sorted({part[column].iloc[0] for *_, part in models})):
                ax.axhline(null, **plotting.NULL, linestyle=dash, label=None if i else label)
        ax.set_ylabel("hit ratio")
    of_ratios = [ax.get_ylim() for ax in (ratio, *axes[2:])]
    for ax in (ratio, *axes[2:]):
        ax.set_ylim(min(low for low, _ in of_ratios), max(high for _, high in of_ratios))
    gain.axhline(0, **plotting.NULL, linestyle=_OTHERS_DASH, label="other images' masks")
    gain.set_ylabel("gain")
    titles = ("mean over heads", "mean over heads, less other images' masks", "best head")
    for ax, title in zip(axes, titles, strict=False):
        plotting.title(ax, title)
        plotting.step_axis(ax, [step for *_, part in models for step in part["step"]])
    plotting.legend_below(panel, axes)


def _plot_heads(
    panel: SubFigure, name: str, part: pd.DataFrame, limits: tuple[float, float]
) -> None:
    """Hit ratio of every head and step; all models share the colours."""
    heads = part[part["head"].str.isdigit()]
    table = heads.assign(head=heads["head"].astype(int)).pivot(
        index="head", columns="step", values="hit_ratio"
    )
    ax = plotting.subcanvas(panel)[0, 0]
    steps, names = list(table.columns), list(table.index)
    plotting.heat_map(panel, ax, table.to_numpy(), steps, names, "hit ratio", limits=limits)
    ax.set(xlabel="step", ylabel="head")
    ax.set_title(name, fontsize=10)


def _plot_maps(
    panel: SubFigure, name: str, saliency: str, part: pd.DataFrame, examples: dict[str, np.ndarray]
) -> None:
    """Image, outline of the mask, and the maps of the head with the highest hit ratio."""
    single = part[part["head"].str.isdigit() | (part["head"] == "all")].reset_index()
    best = str(single["head"].iloc[int(single["hit_ratio"].argmax())])
    head = 0 if best == "all" else int(best)
    images, masks, maps = examples["image"] / 255.0, examples["mask"], examples["maps"][:, :, head]
    axes = panel.subplots(len(images), maps.shape[1] + 1, squeeze=False)
    for row, image, mask, by_step in zip(axes, images, masks, maps, strict=True):
        plotting.overlay(row[0], image, outline=mask)
        for ax, shown in zip(row[1:], by_step, strict=True):
            plotting.overlay(ax, image, shown, mask)
    for step, ax in enumerate(axes[0]):
        ax.set_title("image" if step == 0 else f"step {step}", fontsize=8)
    panel.suptitle(f"{name}: {saliency if best == 'all' else f'head {head}'}", fontsize=10)
