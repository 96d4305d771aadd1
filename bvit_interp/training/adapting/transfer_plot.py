"""The figure of a transfer: accuracy against what was trained, and the steps at which an adapter
works."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting

_MODES = {
    "probe": "probe",
    "te": "time\nembedding",
    "lora-qv": "LoRA\nq, v",
    "lora-ffn": "LoRA\nFFN",
    "full": "all\nweights",
}
_ALONE = r"^step (\d+)$"


def plot(frame: pd.DataFrame) -> Figure:
    """A row a data set: modes beside each other, and single-step adapters where there are any.
    Means over seeds, bars of one standard deviation, of one seed its 95 % interval over images;
    nulls are grey."""
    frame = frame.assign(
        series=_series(frame), step=frame["steps"].str.extract(_ALONE)[0].astype(float)
    )
    sets, swept = list(frame["data"].unique()), frame["step"].notna().any()
    figure, axes = plotting.canvas(columns=2 if swept else 1, rows=len(sets), width=5.6, height=4.0)
    for row, data in zip(axes, sets, strict=True):
        own = frame[frame["data"] == data]
        _modes(row[0], own)
        row[0].set_title(data)
        if swept:
            _steps(row[1], own)
            row[1].set_title(f"{data}: an adapter at one step")
    return figure


def _series(frame: pd.DataFrame) -> pd.Series:
    """The model, with what differs of rank, epochs and images; a mode without a rank goes with the
    least."""
    ranks = frame["rank"].where(frame["rank"] > 0)
    ranks = ranks.fillna(ranks.min()).fillna(0).astype(int)
    names = frame["model"].astype(str)
    for values, word in (
        (ranks, "rank {}"),
        (frame["epochs"], "{} epochs"),
        (frame["train_images"], "{:,} images"),
    ):
        if (values.groupby(frame["data"]).nunique() > 1).any():
            names = names + ", " + values.map(word.format)
    return names


def _modes(ax: Axes, frame: pd.DataFrame) -> None:
    whole = frame[(frame["steps"] == "all") | (frame["mode"] == "probe")]
    trained = whole[whole["backbone"] == "trained"]
    modes = [mode for mode in _MODES if (trained["mode"] == mode).any()]
    listed = list(trained["series"].unique())
    for i, series in enumerate(listed):
        own = trained[trained["series"] == series]
        found = _over_seeds(own, "mode")
        found = found.reindex([mode for mode in modes if mode in found.index])
        places = [modes.index(mode) + 0.14 * (i - (len(listed) - 1) / 2) for mode in found.index]
        style: dict[str, Any] = {**plotting.line_style(i), "linestyle": "none", "markersize": 6}
        label = f"{series}, {_seeds(found['count'])}"
        ax.errorbar(places, found["mean"], yerr=_bars(found), capsize=3, label=label, **style)
        for place, (mode, mean) in zip(places, found["mean"].items(), strict=True):
            if (
                trained.loc[trained["mode"] == mode, "series"].nunique() == 1
            ):  # else numbers would overlap
                ax.annotate(
                    f"{mean:.3f}",
                    (place, mean),
                    textcoords="offset points",
                    xytext=(10, -3),
                    fontsize=8,
                )
        exact = own["exact"].mean()
        if exact == exact:
            said = (
                "probe, exact solver"
                if "exact" not in "".join(ax.get_legend_handles_labels()[1])
                else None
            )
            ax.plot(
                [places[list(found.index).index("probe")]], [exact], "_k", markersize=15, label=said
            )
    _nulls(ax, frame)
    counts = [trained.loc[trained["mode"] == mode, "trainable"].unique() for mode in modes]
    labels = [
        f"{_MODES[mode]}\n{' / '.join(map(_short, of))}"
        for mode, of in zip(modes, counts, strict=True)
    ]
    ax.set_xticks(range(len(modes)), labels)
    ax.set(
        xlabel="trained beside the head",
        ylabel="test accuracy",
        ylim=(0, 1.02),
        xlim=(-0.5, len(modes) - 0.3),
    )
    _legend(ax)


def _steps(ax: Axes, frame: pd.DataFrame) -> None:
    """Adapters at a single step each, and apart from them the same at no step and at all."""
    last = frame["step"].max()
    if last != last:
        ax.set_axis_off()
        return
    swept = frame.loc[frame["step"].notna(), ["mode", "series"]].drop_duplicates()
    for i, (mode, series) in enumerate(zip(swept["mode"], swept["series"], strict=True)):
        own = frame[(frame["mode"] == mode) & (frame["series"] == series)]
        style = {**plotting.line_style(i), "capsize": 3}
        each = _over_seeds(own, "step")
        label = f"{_MODES[mode]}, {series}, {_seeds(each['count'])}".replace("\n", " ")
        ax.errorbar(each.index, each["mean"], yerr=_bars(each), label=label, **style)
        ends = _over_seeds(own, "steps").reindex(["none", "all"])
        places = [last + 1.5 + 0.2 * i, last + 2.5 + 0.2 * i]
        ax.errorbar(places, ends["mean"], yerr=_bars(ends), **{**style, "linestyle": "none"})
    ax.axvline(last + 0.85, color="0.8", linewidth=0.8)
    ticks = sorted(frame["step"].dropna().unique())
    ax.set_xticks([*ticks, last + 1.55, last + 2.55], [*(f"{t:.0f}" for t in ticks), "none", "all"])
    ax.set(xlabel="step with the adapter", ylabel="test accuracy")
    _legend(ax)


def _nulls(ax: Axes, frame: pd.DataFrame) -> None:
    random = frame.loc[frame["backbone"] == "random", "accuracy"]
    if len(random):
        ax.axhline(random.mean(), **plotting.NULL, linestyle="--", label="probe of random weights")
    ax.axhline(frame["chance"].iloc[0], **plotting.NULL, label="chance")


def _legend(ax: Axes) -> None:
    """Below the axes: lines may lie anywhere in them."""
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2)


def _over_seeds(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Mean, deviation and number of seeds, and the interval over images, which counts for a single
    seed."""
    accuracy = {
        "mean": ("accuracy", "mean"),
        "std": ("accuracy", "std"),
        "count": ("accuracy", "count"),
    }
    return frame.groupby(key).agg(**accuracy, low=("low", "mean"), high=("high", "mean"))


def _bars(found: pd.DataFrame) -> list[pd.Series]:
    """Below and above the mean: the deviation over seeds, of one seed the interval over images."""
    return [
        found["std"].fillna(side)
        for side in (found["mean"] - found["low"], found["high"] - found["mean"])
    ]


def _seeds(counts: pd.Series) -> str:
    least, most = int(counts.min()), int(counts.max())
    if most == 1:
        return "one seed"
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"


def _short(n: float) -> str:
    return f"{n:,.0f}" if n < 1e4 else f"{n / 1e3:,.0f}K" if n < 1e6 else f"{n / 1e6:.1f}M"
