"""The figure of a transfer: accuracy against what was trained, and the steps at which an adapter works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODES = {
    "probe": "probe", "te": "time\nembedding", "lora-qv": "LoRA\nq, v", "lora-ffn": "LoRA\nFFN", "full": "all\nweights",
}  # fmt: skip
_ALONE = r"step (\d+)"


def plot(frame: pd.DataFrame) -> Figure:
    """A row a data set: modes beside each other, and single-step adapters where there are any. Means over seeds, bars
    of one standard deviation; nulls are grey."""
    from bvit_interp import plotting

    sets, swept = list(frame["data"].unique()), frame["steps"].str.fullmatch(_ALONE).any()
    figure, axes = plotting.canvas(columns=2 if swept else 1, rows=len(sets), width=5.4, height=3.5)
    for row, data in zip(axes, sets, strict=True):
        own = frame[frame["data"] == data]
        _modes(row[0], own)
        row[0].set_title(data)
        if swept:
            _steps(row[1], own)
            row[1].set_title(f"{data}: an adapter at one step")
    return figure


def _modes(ax: Axes, frame: pd.DataFrame) -> None:
    from bvit_interp import plotting

    whole = frame[~frame["steps"].str.startswith("step") & ~((frame["steps"] == "none") & (frame["mode"] != "probe"))]
    modes = [mode for mode in _MODES if (whole["mode"] == mode).any()]
    trained = whole[whole["backbone"] == "trained"]
    series = list(trained.groupby(["model", "rank", "epochs", "train_images"], sort=False).groups)
    models = list(dict.fromkeys(key[0] for key in series))
    for i, model in enumerate(models):
        own = (
            trained[trained["model"] == model].groupby("mode")["accuracy"].agg(["mean", "std", "count"]).reindex(modes)
        )
        shift = 0.12 * (i - (len(models) - 1) / 2)
        style: dict[str, Any] = {**plotting.line_style(i), "linestyle": "none", "markersize": 6}
        ax.errorbar(
            [place + shift for place in range(len(modes))], own["mean"], yerr=own["std"], capsize=3,
            label=f"{model}, {_seeds(own['count'].max())}", **style,
        )  # fmt: skip
        for place, (_, line) in enumerate(own.iterrows()):
            if line["count"] > 0 and len(models) == 1:
                ax.annotate(
                    f"{line['mean']:.3f}", (place, line["mean"]), textcoords="offset points", xytext=(8, 3), fontsize=8
                )
    exact = trained["exact"].dropna()
    if len(exact) and "probe" in modes and len(models) == 1:
        ax.plot([modes.index("probe")], [exact.mean()], "_", color="black", markersize=16, label="probe, exact solver")
    _nulls(ax, frame)
    counts = [trained.loc[trained["mode"] == mode, "trainable"].max() for mode in modes]
    labels = [f"{_MODES[mode]}\n{_short(n)}" for mode, n in zip(modes, counts, strict=True)]
    ax.set_xticks(range(len(modes)), labels)
    ax.set(xlabel="trained beside the head", ylabel="test accuracy", ylim=(0, 1.02), xlim=(-0.5, len(modes) - 0.3))
    plotting.legend(ax)


def _steps(ax: Axes, frame: pd.DataFrame) -> None:
    """Adapters at a single step each, against the same at all steps and none."""
    from bvit_interp import plotting

    alone = frame["steps"].str.extract(rf"^{_ALONE}$")[0].astype(float)
    modes = [mode for mode in _MODES if (alone.notna() & (frame["mode"] == mode)).any()]
    for i, mode in enumerate(modes):
        own = frame[frame["mode"] == mode]
        each = own["accuracy"].groupby(alone[own.index]).agg(["mean", "std", "count"])
        style = plotting.line_style(i)
        label = f"{_MODES[mode]}, {_seeds(each['count'].max())}".replace("\n", " ")
        ax.errorbar(each.index, each["mean"], yerr=each["std"], capsize=3, label=label, **style)
        for word, dash in (("all", "-"), ("none", ":")):
            level = own.loc[own["steps"] == word, "accuracy"]
            if len(level):
                said = f"{_MODES[mode]}, {word} steps".replace("\n", " ").replace("none", "no")
                ax.axhline(level.mean(), color=style["color"], linewidth=1.0, linestyle=dash, label=said)
    ax.set(ylabel="test accuracy")
    if modes:
        plotting.step_axis(ax, alone.dropna())
        plotting.legend(ax)
    else:
        ax.set_axis_off()


def _nulls(ax: Axes, frame: pd.DataFrame) -> None:
    from bvit_interp import plotting

    random = frame.loc[frame["backbone"] == "random", "accuracy"]
    if len(random):
        ax.axhline(random.mean(), **plotting.NULL, linestyle="--", label="probe of random weights")
    ax.axhline(frame["chance"].iloc[0], **plotting.NULL, label="chance")


def _seeds(n: float) -> str:
    return "one seed" if n == 1 else f"{n:.0f} seeds"


def _short(n: float) -> str:
    return f"{n:,.0f}" if n < 1e4 else f"{n / 1e3:,.0f}K" if n < 1e6 else f"{n / 1e6:.1f}M"
