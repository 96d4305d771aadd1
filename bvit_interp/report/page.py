"""One self-contained HTML page of a folder of results: opens from disk, needs no server and no
network."""

from __future__ import annotations

import base64
import importlib
import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from bvit_interp.analyses import ANALYSES
from bvit_interp.errors import UserError
from bvit_interp.report import unit_page
from bvit_interp.results import read_table, replacing

SHOWN = 1000  # rows of a table; its CSV has them all


def write(folder: Path, out: Path | None = None) -> Path:
    """Write the page of every analysis whose table lies in `folder`, and beside it one for each
    described unit.

    Returns the page's path.

    Raises
    ------
    UserError
        If the folder is missing or holds no table of an analysis.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    sections = [_section(folder, word) for word in ANALYSES if (folder / f"{word}.csv").is_file()]
    if not sections:
        tables = ", ".join(f"{word}.csv" for word in ANALYSES)
        raise UserError(f"{folder} holds no results; a report needs one of {tables}")
    out = out or folder / "report.html"
    selectivity = folder / "selectivity.csv"
    units = unit_page.write(read_table(selectivity), folder, out) if selectivity.is_file() else {}
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bvit_interp", "report"), autoescape=True
    )
    with replacing(out) as temporary:
        page = templates.get_template("page.html.j2")
        temporary.write_text(page.render(sections=sections, folder=folder.name, units=units))
    return out


def _section(folder: Path, word: str) -> dict[str, Any]:
    """What the template shows of one analysis."""
    module = importlib.import_module(f"bvit_interp.analyses.{word}")
    question, _, text = (module.__doc__ or "").partition("\n")
    path = folder / f"{word}.csv"
    frame = read_table(path)
    figure, about = path.with_suffix(".png"), path.with_suffix(".json")
    return {
        "word": word,
        "command": word.replace("_", "-"),
        "question": question,
        "paragraphs": [" ".join(part.split()) for part in text.split("\n\n") if part.strip()],
        "columns": {name: module.COLUMNS.get(name, "") for name in frame.columns},
        "length": len(frame),
        "rows": [
            [_cell(value) for value in row] for row in frame.head(SHOWN).itertuples(index=False)
        ],
        "figure": base64.b64encode(figure.read_bytes()).decode() if figure.is_file() else None,
        "about": _options(about) if about.is_file() else None,
    }


def _options(path: Path) -> str:
    try:
        return json.dumps(json.loads(path.read_text()), indent=2)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)
