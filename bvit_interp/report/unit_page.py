"""A page for each neuron and head whose life `selectivity` tells in full, beside the report that
links to it."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvit_interp import plotting
from bvit_interp.analyses.selectivity import COLUMNS
from bvit_interp.errors import MissingExtra
from bvit_interp.results import replacing

FOLDER = "units"
_NEEDED = {
    "model",
    "kind",
    "unit",
    "step",
    "statistic",
    "class",
    "value",
    "low",
    "high",
    "null",
    "rank",
    "top",
    "path",
}
_STEPWISE = {
    "selectivity": ("selectivity", "random groups of images"),
    "firing": ("share of patches where it fires", ""),
    "ablation_logit": ("true logit, ablated at this step", "other units"),
}
"""Statistics that have a panel: its title, and what the null is."""


def write(frame: pd.DataFrame, folder: Path, out: Path) -> dict[str, str]:
    """Write a page for every unit with class means in the table of `selectivity`.

    Parameters
    ----------
    frame : the table, read back; one with other columns has no units.
    folder : the results it lies among, with the pictures in `selectivity/`.
    out : the report, in whose folder `units/` the pages go.

    Returns
    -------
    Name of each unit -> its page, relative to the report.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    if not set(frame) >= _NEEDED:
        return {}
    told = frame.loc[
        frame["statistic"] == "class_mean", ["model", "kind", "unit"]
    ].drop_duplicates()
    links = {}
    for model, kind, unit in told.itertuples(index=False):
        of_unit = (frame["model"] == model) & (frame["kind"] == kind) & (frame["unit"] == unit)
        title = f"{kind} {unit:.0f} of {model}"
        link = f"{FOLDER}/{re.sub(r'[^A-Za-z0-9._-]', '_', model)}_{kind}{unit:.0f}.html"
        with replacing(out.parent / link) as temporary:
            temporary.write_text(_page(title, frame[of_unit], folder, out.name), encoding="utf-8")
        links[title] = link
    return links


def _page(title: str, frame: pd.DataFrame, folder: Path, report: str) -> str:
    """The page of a unit, from its rows."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bvit_interp", "report"), autoescape=True
    )
    whole, stepwise = frame[frame["step"].isna()], frame[frame["step"].notna()]
    images, width = _images(stepwise, folder)
    return templates.get_template("unit.html.j2").render(
        title=title,
        back=f"../{report}",
        life=_in_words(whole, stepwise),
        figure=_png(_figure(stepwise)),
        images=images,
        width=width,
        null=COLUMNS["null"],
        rank=COLUMNS["rank"],
        life_rows=[
            [
                row.statistic
                + (" (at every step)" if row.statistic.startswith("ablation") else ""),
                _said(row.value),
                _said(row.null),
                _said(row.rank),
            ]
            for row in whole.itertuples()
        ],
        step_rows=[
            [
                _said(row.step),
                row.statistic,
                row.top if isinstance(row.top, str) else _said(about),
                _said(row.value),
                _said(row.low),
                _said(row.high),
                _said(row.null),
            ]
            for row, about in zip(stepwise.itertuples(), stepwise["class"], strict=True)
        ],
    )


def _said(value: Any) -> str:
    """A cell: four digits, nothing for nan; a class named by a number is one again."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def _in_words(whole: pd.DataFrame, stepwise: pd.DataFrame) -> str:
    """The life of the unit in a few sentences."""
    of = whole.set_index("statistic")["value"]
    steps, last = of.get("lifetime", 0.0), stepwise["step"].max()
    preferred = stepwise[stepwise["statistic"] == "selectivity"].set_index("step")
    if not steps > 0:
        return f"Selective for no class at any of {last:.0f} steps: not more than chance and the threshold allow."
    text = (
        f"Selective at {steps:.0f} of {last:.0f} steps: born at step {of['birth']:.0f}, last alive at step "
        f"{of['death']:.0f}. It answers most to class {_said(preferred.loc[of['birth'], 'class'])} at the first of "
        f"them, and to class {_said(preferred.loc[of['death'], 'class'])} at the last."
    )
    if of.get("role_change_ends", float("nan")) >= 0:
        text += f" The two profiles correlate by {1 - of['role_change_ends']:.2f}."
    return text


def _images(stepwise: pd.DataFrame, folder: Path) -> tuple[str | None, int]:
    """The PNG of the top images, and how many pixels wide to show it; None where its file is
    missing."""
    named = stepwise["path"].dropna()
    path = folder / "selectivity" / Path(named.iloc[0]).name if len(named) else None
    if path is None or not path.is_file():
        return None, 0
    return base64.b64encode(path.read_bytes()).decode(), 120 * len(
        stepwise["top"].dropna().iloc[0].split()
    )


def _png(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=90, format="png", facecolor="white")
    return base64.b64encode(buffer.getvalue()).decode()


def _figure(stepwise: pd.DataFrame) -> Figure:
    """Selectivity, firing, effect of ablation, and the class means, over steps."""
    try:
        from bvit_interp import plotting
    except ImportError:
        raise MissingExtra("matplotlib", "viz") from None
    shown = {key: said for key, said in _STEPWISE.items() if key in set(stepwise["statistic"])}
    figure, axes = plotting.canvas(columns=len(shown) + 1, width=4.0, height=3.0)
    for i, (ax, (key, (title, null))) in enumerate(zip(axes[0], shown.items(), strict=False)):
        _line(ax, stepwise[stepwise["statistic"] == key], i, null)
        ax.set_title(title, fontsize=10)
    means = stepwise[stepwise["statistic"] == "class_mean"]
    deviations = means.assign(value=means["value"] - means["null"])
    table = deviations.pivot(index="class", columns="step", values="value")
    extent = float(table.abs().max().max())
    steps, classes = (
        [f"{step:.0f}" for step in table.columns],
        [_said(name) for name in table.index],
    )
    plotting.heat_map(
        figure,
        axes[0, -1],
        table.to_numpy(float),
        steps,
        classes,
        "from the mean of classes",
        numbers=False,
        limits=(-extent, extent),
    )
    axes[0, -1].set_title("mean answer to each class", fontsize=10)
    axes[0, -1].set_xlabel("step")
    return figure


def _line(ax: Axes, part: pd.DataFrame, i: int, null: str) -> None:
    style = plotting.line_style(i)
    ax.plot(part["step"], part["value"], **style)
    ax.fill_between(
        part["step"], part["low"], part["high"], color=style["color"], alpha=0.2, linewidth=0
    )
    if null:
        ax.plot(part["step"], part["null"], **plotting.NULL, label=null)
        plotting.legend(ax)
    plotting.step_axis(ax, part["step"])
