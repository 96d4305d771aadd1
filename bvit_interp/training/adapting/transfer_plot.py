"""The figure of a transfer: accuracy by mode and by step."""

from __future__ import annotations

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
_SINGLE_STEP = r"^step (\d+)$"
_EXACT_LABEL = "probe, exact solver"
_APART = 0.14  # between two series at one mode, in modes


@plotting.house_style()
def plot(frame: pd.DataFrame) -> Figure:
    """One row per data set: modes beside each other, and adapters at single steps if there are any.

    Values are means over seeds. Bars and bands reach one standard deviation over the seeds; for a
    single seed they are the 95 % interval over images. Nulls are grey.
    """
    steps = frame["steps"].str.extract(_SINGLE_STEP)[0].astype(float)
    frame = frame.assign(series=_series(frame), step=steps)
    datasets, has_steps = list(frame["data"].unique()), frame["step"].notna().any()
    figure, axes = plotting.canvas(
        columns=2 if has_steps else 1, rows=len(datasets), width=5.6, height=4.0
    )
    for row, data in zip(axes, datasets, strict=True):
        rows = frame[frame["data"] == data]
        _draw_modes(row[0], rows)
        plotting.title(row[0], data, 11)
        if has_steps:
            _draw_steps(row[1], rows)
            plotting.title(row[1], f"{data}: an adapter at one step", 11)
    return figure


def _series(frame: pd.DataFrame) -> pd.Series:
    """The model, with its rank, epochs and images where these differ within a data set.

    Modes without a rank belong to the series of the smallest rank.
    """
    ranks = frame["rank"].where(frame["rank"] > 0)
    ranks = ranks.fillna(ranks.min()).fillna(0).astype(int)
    names = frame["model"].astype(str)
    for values, text in (
        (ranks, "rank {}"),
        (frame["epochs"], "{} epochs"),
        (frame["n_train"], "{:,} images"),
    ):
        if (values.groupby(frame["data"]).nunique() > 1).any():
            names = names + ", " + values.map(text.format)
    return names


def _draw_modes(ax: Axes, frame: pd.DataFrame) -> None:
    """Accuracy of each mode, with low-rank updates at all steps."""
    whole = frame[(frame["steps"] == "all") | (frame["mode"] == "probe")]
    trained = whole[whole["backbone"] == "trained"]
    modes = [mode for mode in _MODES if (trained["mode"] == mode).any()]
    series = list(trained["series"].unique())
    for i, name in enumerate(series):
        rows = trained[trained["series"] == name]
        means = _over_seeds(rows, "mode")
        means = means.loc[[mode for mode in modes if mode in means.index]]
        shift = _APART * (i - (len(series) - 1) / 2)
        positions = [modes.index(mode) + shift for mode in means.index]
        style = {**plotting.line_style(i), "markersize": 6}
        label = f"{name}, {_seeds(means['seeds'])}"
        plotting.points(ax, positions, means, style=style, label=label)
        for position, (mode, value) in zip(positions, means["value"].items(), strict=True):
            if trained.loc[trained["mode"] == mode, "series"].nunique() == 1:  # else they overlap
                _write(ax, position, value)
        if "probe" in means.index:
            _draw_exact(ax, rows, positions[list(means.index).index("probe")])
    _draw_nulls(ax, frame)
    labels = [f"{_MODES[mode]}\n{_counts(trained, mode)}" for mode in modes]
    ax.set_xticks(range(len(modes)), labels)
    ax.set(
        xlabel="trained beside the head, and number of parameters",
        ylabel="test accuracy",
        ylim=(0, 1.02),
        xlim=(-0.5, len(modes) - 0.3),
    )
    _legend(ax)


def _write(ax: Axes, position: float, value: float) -> None:
    text, place = f"{value:.3f}", (position, value)
    ax.annotate(text, place, xytext=(10, -3), textcoords="offset points", fontsize=8)


def _draw_exact(ax: Axes, rows: pd.DataFrame, position: float) -> None:
    """A black tick at the accuracy of the exact solver, beside the probe."""
    exact = rows["exact_accuracy"].mean()
    if pd.isna(exact):
        return
    is_labelled = _EXACT_LABEL in ax.get_legend_handles_labels()[1]
    label = None if is_labelled else _EXACT_LABEL
    ax.plot([position], [exact], "_k", markersize=15, label=label)


def _draw_steps(ax: Axes, frame: pd.DataFrame) -> None:
    """Adapters at each single step; apart from them, at no step and at all steps."""
    steps = sorted(frame["step"].dropna().unique())
    if not steps:
        ax.set_axis_off()
        return
    last = steps[-1]
    single = frame.loc[frame["step"].notna(), ["mode", "series"]].drop_duplicates()
    for i, (mode, series) in enumerate(zip(single["mode"], single["series"], strict=True)):
        rows = frame[(frame["mode"] == mode) & (frame["series"] == series)]
        means = _over_seeds(rows, "step").reset_index()
        label = f"{_MODES[mode]}, {series}, {_seeds(means['seeds'])}".replace("\n", " ")
        style, band = plotting.line_style(i), _spread(means["seeds"])
        plotting.line(ax, means, "step", style=style, label=label, interval_label=band)
        ends = _over_seeds(rows, "steps").reindex(["none", "all"])
        positions = [last + 1.5 + 0.2 * i, last + 2.5 + 0.2 * i]
        plotting.points(ax, positions, ends, style=plotting.line_style(i))
    ax.axvline(last + 0.85, color="0.8", linewidth=0.8)
    labels = [*(f"{step:.0f}" for step in steps), "none", "all"]
    ax.set_xticks([*steps, last + 1.55, last + 2.55], labels)
    ax.set(xlabel="step with the adapter", ylabel="test accuracy")
    _legend(ax)


def _draw_nulls(ax: Axes, frame: pd.DataFrame) -> None:
    random = frame.loc[frame["backbone"] == "random", "accuracy"]
    if len(random):
        ax.axhline(random.mean(), **plotting.NULL, linestyle="--", label="probe of random weights")
    ax.axhline(frame["chance"].iloc[0], **plotting.NULL, label="chance")


def _legend(ax: Axes) -> None:
    """Draw the legend below the axes, because lines may lie anywhere in them."""
    plotting.legend(ax, below=True)


def _over_seeds(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Mean over seeds (`value`), the ends of its bar (`low`, `high`), and the number of `seeds`.

    A bar is one standard deviation over the seeds; for a single seed, the interval over images.
    """
    grouped = frame.groupby(key)
    means = grouped[["accuracy", "low", "high"]].mean()
    deviation, value = grouped["accuracy"].std(), means["accuracy"]
    return pd.DataFrame(
        {
            "value": value,
            "low": (value - deviation).fillna(means["low"]),
            "high": (value + deviation).fillna(means["high"]),
            "seeds": grouped["accuracy"].count(),
        }
    )


def _seeds(counts: pd.Series) -> str:
    least, most = int(counts.min()), int(counts.max())
    if most == 1:
        return "one seed"
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"


def _spread(counts: pd.Series) -> str:
    """The label of the bands."""
    return plotting.INTERVAL if counts.max() == 1 else "standard deviation over seeds"


def _counts(trained: pd.DataFrame, mode: str) -> str:
    """Numbers of trained parameters of a mode, one per model."""
    counts = trained.loc[trained["mode"] == mode, "trainable_parameters"].unique()
    return " / ".join(map(_short, counts))


def _short(n: float) -> str:
    return f"{n:,.0f}" if n < 1e4 else f"{n / 1e3:,.0f}K" if n < 1e6 else f"{n / 1e6:.1f}M"
