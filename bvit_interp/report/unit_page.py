"""HTML pages for the described units of `selectivity`, linked from the report."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from bvit_interp.analyses.selectivity import COLUMNS, UNIT_NAMES
from bvit_interp.errors import MissingExtra
from bvit_interp.results import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "units"
_PIXELS_PER_IMAGE = 120  # width of a top image on the page
_PANELS = {
    "selectivity": ("selectivity", "random groups of images"),
    "firing": ("share of patches where it fires", ""),
    "ablation_logit": ("change of the true logit, ablated at this step", "random units"),
}
"""Metric -> title of its panel and label of its null."""


def write(frame: pd.DataFrame, folder: Path, out: Path) -> dict[str, str]:
    """Write a page for every unit with class means in the table of `selectivity`.

    Parameters
    ----------
    frame : the table; a table without the columns of `selectivity` has no units.
    folder : folder of results, with the top images in `selectivity/`.
    out : path of the report; the pages go to `units/` in its folder.

    Returns
    -------
    Name of each unit -> path of its page, relative to the report.

    Raises
    ------
    MissingExtra
        If matplotlib is not installed.
    """
    if not set(frame) >= set(COLUMNS) - {"n"}:
        return {}
    class_means = frame.loc[frame["metric"] == "class_mean", ["model", "site", "unit"]]
    links = {}
    for model, site, unit in class_means.drop_duplicates().itertuples(index=False):
        name = f"{UNIT_NAMES[site]} {unit:.0f} of {model}"
        file = re.sub(r"[^A-Za-z0-9._-]", "_", f"{model}_{UNIT_NAMES[site]}{unit:.0f}")
        link = f"{FOLDER}/{file}.html"
        chosen = (frame["model"] == model) & (frame["site"] == site) & (frame["unit"] == unit)
        with replacing(out.parent / link) as temporary:
            text = _page(name, frame[chosen], folder, out.name)
            temporary.write_text(text, encoding="utf-8")
        links[name] = link
    return links


def _page(title: str, frame: pd.DataFrame, folder: Path, report: str) -> str:
    """The page of one unit, from its rows."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bvit_interp", "report"), autoescape=True
    )
    overall, stepwise = frame[frame["step"].isna()], frame[frame["step"].notna()]
    images, width = _top_images(stepwise, folder)
    return templates.get_template("unit.html.j2").render(
        title=title,
        back=f"../{report}",
        summary=_summary(overall, stepwise),
        figure=_png(_figure(stepwise)),
        images=images,
        width=width,
        null=COLUMNS["null"],
        rank=COLUMNS["rank"],
        overall_rows=_overall_cells(overall),
        step_rows=_step_cells(stepwise),
    )


def _overall_cells(overall: pd.DataFrame) -> list[list[str]]:
    """Metric, value, null and rank of the rows for all steps together."""
    rows = overall[["metric", "value", "null", "rank"]].to_dict("records")
    cells = []
    for row in rows:
        metric = str(row["metric"])
        name = f"{metric} (at every step)" if metric.startswith("ablation") else metric
        cells.append([name, *(_cell(row[key]) for key in ("value", "null", "rank"))])
    return cells


def _step_cells(stepwise: pd.DataFrame) -> list[list[str]]:
    """Step, metric, class or images, value, interval and null of the rows for single steps."""
    about = stepwise["top_images"].where(stepwise["top_images"].notna(), stepwise["class"])
    columns = stepwise.assign(about=about)[
        ["step", "metric", "about", "value", "low", "high", "null"]
    ]
    return [[_cell(value) for value in row] for row in columns.itertuples(index=False)]


def _cell(value: Any) -> str:
    """A float with four digits, empty for nan; any other value as it is."""
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def _summary(overall: pd.DataFrame, stepwise: pd.DataFrame) -> str:
    """Text that says when the unit is selective, and for which classes."""
    values = overall.set_index("metric")["value"]
    lifetime, steps = values.get("lifetime", 0.0), stepwise["step"].max()
    if not lifetime > 0:
        return f"Not selective at any of {steps:.0f} steps."
    onset, offset = values["onset"], values["offset"]
    classes = stepwise[stepwise["metric"] == "selectivity"].set_index("step")["class"]
    text = (
        f"Selective at {lifetime:.0f} of {steps:.0f} steps, from step {onset:.0f} to step"
        f" {offset:.0f}. The class with the largest mean response is {_cell(classes[onset])} at"
        f" step {onset:.0f}, and {_cell(classes[offset])} at step {offset:.0f}."
    )
    change = values.get("profile_change_ends", float("nan"))
    if pd.notna(change):
        text += f" The correlation of the two profiles is {1 - change:.2f}."
    return text


def _top_images(stepwise: pd.DataFrame, folder: Path) -> tuple[str | None, int]:
    """The PNG of the top-k images (None if the file is missing), and its width on the page."""
    paths = stepwise["path"].dropna()
    path = folder / "selectivity" / Path(paths.iloc[0]).name if len(paths) else None
    if path is None or not path.is_file():
        return None, 0
    images = len(stepwise["top_images"].dropna().iloc[0].split())
    return base64.b64encode(path.read_bytes()).decode(), _PIXELS_PER_IMAGE * images


def _figure(stepwise: pd.DataFrame) -> Figure:
    """Selectivity, firing rate, effect of ablation, and class means at every step."""
    try:
        from bvit_interp import plotting
    except ImportError:
        raise MissingExtra("matplotlib", "viz") from None
    with plotting.house_style():
        return _panels(plotting, stepwise)


def _panels(plotting: Any, stepwise: pd.DataFrame) -> Figure:
    """The panels of `_figure`, by the optional module of the house's figures."""
    shown = [metric for metric in _PANELS if metric in set(stepwise["metric"])]
    figure, axes = plotting.canvas(columns=len(shown) + 1, width=4.0, height=3.0)
    *panels, last = axes[0]
    for i, (ax, metric) in enumerate(zip(panels, shown, strict=True)):
        title, null = _PANELS[metric]
        rows, style = stepwise[stepwise["metric"] == metric], plotting.line_style(i)
        plotting.line(ax, rows, "step", style=style, null="null" if null else None, null_label=null)
        plotting.step_axis(ax, rows["step"])
        plotting.legend(ax)
        plotting.title(ax, title)
    means = stepwise[stepwise["metric"] == "class_mean"]
    deviations = means.assign(value=means["value"] - means["null"])
    table = deviations.pivot(index="class", columns="step", values="value")
    largest = float(table.abs().max().max())
    plotting.heat_map(
        figure,
        last,
        table.to_numpy(float),
        [f"{step:.0f}" for step in table.columns],
        [_cell(name) for name in table.index],
        "difference from the mean over classes",
        numbers=False,
        limits=(-largest, largest),
    )
    plotting.title(last, "mean response to each class")
    last.set_xlabel("step")
    return figure


def _png(figure: Figure) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=90, format="png", facecolor="white")
    return base64.b64encode(buffer.getvalue()).decode()
