"""One HTML page with all results of a folder."""

from __future__ import annotations

import ast
import base64
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pandas as pd

from bvit_interp.analyses import ANALYSES
from bvit_interp.errors import UserError
from bvit_interp.report import unit_page
from bvit_interp.results import read_table, replacing

SHOWN = 1000
"""Most rows of a table on the page; the CSV file has all rows."""


def write(folder: Path, out: Path | None = None) -> Path:
    """Write a page with every analysis whose table is in a folder.

    The page opens from disk, without server and network. Each described unit gets its own page.

    Parameters
    ----------
    folder : folder of results. A question's files lie in it, or below it in a folder of its word
        (the default ``--out``).
    out : path of the page; by default ``report.html`` in the folder.

    Returns
    -------
    The page's path.

    Raises
    ------
    UserError
        If the folder is missing or holds no table of an analysis.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    found = {word: path for word in ANALYSES if (path := _table(folder, word)) is not None}
    if not found:
        tables = ", ".join(f"{word}.csv" for word in ANALYSES)
        raise UserError(f"{folder} holds no results; a report needs one of {tables}")
    sections = [_section(path, word) for word, path in found.items()]
    out = out or folder / "report.html"
    units = {}
    if "selectivity" in found:
        table = found["selectivity"]
        units = unit_page.write(read_table(table), table.parent, out)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bvit_interp", "report"), autoescape=True
    )
    with replacing(out) as temporary:
        page = templates.get_template("page.html.j2")
        temporary.write_text(page.render(sections=sections, folder=folder.name, units=units))
    return out


def _table(folder: Path, word: str) -> Path | None:
    """The table of a question, if it is there."""
    places = (folder / f"{word}.csv", folder / word / f"{word}.csv")
    return next((path for path in places if path.is_file()), None)


def _section(path: Path, word: str) -> dict[str, Any]:
    """The parts of one analysis for the template."""
    analysis = importlib.import_module(f"bvit_interp.analyses.{word}")
    question, *summary = _paragraphs(analysis.__doc__ or "")
    frame = read_table(path)
    if frame.empty:
        raise UserError(f"{path} has no rows")
    figure, about = path.with_suffix(".png"), path.with_suffix(".json")
    return {
        "word": word,
        "command": word.replace("_", "-"),
        "question": question,
        "summary": summary,
        "method": _paragraphs(_method(analysis)),
        "columns": {name: analysis.COLUMNS.get(name, "") for name in frame.columns},
        "length": len(frame),
        "rows": [
            [_cell(value) for value in row] for row in frame.head(SHOWN).itertuples(index=False)
        ],
        "figure": base64.b64encode(figure.read_bytes()).decode() if figure.is_file() else None,
        "about": _options(about) if about.is_file() else None,
    }


def _method(analysis: ModuleType) -> str:
    """The docstring of the folder's ``measure.py``, read without importing it."""
    source = Path(str(analysis.__file__)).with_name("measure.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _options(path: Path) -> str:
    try:
        return json.dumps(json.loads(path.read_text()), indent=2)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)
