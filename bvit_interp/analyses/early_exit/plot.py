"""Figure of `early_exit`, from its table alone."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from bvit_interp import plotting


def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy against FLOPs with the random-exit null, time saved against FLOPs saved, and what
    each exit knows."""
    figure, axes = plotting.canvas(columns=3, width=4.2, height=3.4)
    curve, saved, exits = axes[0]
    for i, (name, part) in enumerate(frame.groupby("model", sort=False)):
        style, of = plotting.line_style(i), dict(tuple(part.groupby("kind", sort=False)))
        line = of["curve"].sort_values("gflops")
        curve.plot(line["gflops"], line["accuracy"], **{**style, "marker": ""}, label=name)
        curve.fill_between(
            line["gflops"], line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0
        )
        curve.plot(
            line["gflops"],
            line["accuracy_null"],
            **plotting.NULL,
            label=None if i else "left at random",
        )
        curve.plot(
            of["threshold"]["gflops"], of["threshold"]["accuracy"], **{**style, "linestyle": ""}
        )
        timed = of["curve" if of["curve"]["ms"].notna().any() else "threshold"].sort_values(
            "saved_flops"
        )
        saved.plot(
            timed["saved_flops"], timed["saved_time"], **{**style, "linewidth": 0.8}, label=name
        )
        alone = of["exit"]
        hollow = {**style, "markerfacecolor": "white"}  # the other panels name the models
        exits.plot(
            alone["exit"], alone["accuracy"], **style, label=None if i else "accuracy (filled)"
        )
        exits.plot(alone["exit"], alone["auroc"], **hollow, label=None if i else "AUROC (hollow)")
    ends = [min(0, *saved.get_xlim()), max(saved.get_xlim())]
    saved.plot(ends, ends, **plotting.NULL, label="time saved = FLOPs saved")
    exits.axhline(0.5, **plotting.NULL, label="AUROC of chance")
    curve.set(xlabel="GFLOPs an image", ylabel="accuracy", title="threshold from 0 to 1")
    saved.set(xlabel="share of FLOPs saved", ylabel="share of time saved", title="measured")
    exits.set(ylabel="share", title="each classifier on all images", ylim=(None, 1.02))
    plotting.step_axis(exits, frame["exit"].dropna())
    for ax in axes[0]:
        plotting.legend(ax)
    return figure
