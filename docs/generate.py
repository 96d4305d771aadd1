"""Write the parts of the documentation that are taken from the code.

    python docs/generate.py            # the marked parts of README.md,
                                       # docs/reproduction.md and docs/through-time.md;
                                       # docs/questions.md, docs/house.md
    python docs/generate.py --check    # exit code 1 if one of them is not up to date

A question's folder gives its command, the question in one sentence, the options and the columns.
Every module gives the first line of its docstring, and `vocabulary` gives the table of sites.
`report.claims` judges each claim by its rule; all numbers there are read from `figures/`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from bvit_interp.analyses import OF_THE_PAPER, THROUGH_TIME
from bvit_interp.data.options import LoaderOptions
from bvit_interp.report import claims
from bvit_interp.report.claims.claim import Claim, Finding, Tables, overall
from bvit_interp.vocabulary import SITES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bvit_interp"
FIGURES = ROOT / "figures"
FLOORS = (  # from the top
    "cli",
    "report",
    "analyses",
    "training",
    "probes",
    "plotting",
    "data",
    "models",
    "metrics",
    "results.py",
    "vocabulary.py",
    "errors.py",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    check = parser.parse_args().check
    stale = []
    for path, text in pages().items():
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(path.relative_to(ROOT))
        if not check:
            path.write_text(text)
    for path in stale:
        print(f"{path}: {'out of date, run python docs/generate.py' if check else 'written'}")
    sys.exit(1 if check and stale else 0)


def pages() -> dict[Path, str]:
    """Every generated page, by path."""
    readme, paper = ROOT / "README.md", ROOT / "docs" / "reproduction.md"
    ours = ROOT / "docs" / "through-time.md"
    return {
        readme: replaced(readme, {"commands": commands(), "sites": sites()}),
        paper: replaced(paper, {"claims": of_the_paper()}),
        ours: replaced(ours, {"claims": through_time()}),
        ROOT / "docs" / "questions.md": questions(),
        ROOT / "docs" / "house.md": house(),
    }


def replaced(path: Path, parts: Mapping[str, str]) -> str:
    """A page with new text between the two marks of each part."""
    page = path.read_text()
    for part, text in parts.items():
        begin, end = f"<!-- {part}: docs/generate.py -->\n", f"<!-- end of {part} -->"
        head, found, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{path} has no part marked {begin.strip()} ... {end}")
        page = head + begin + text + end + tail
    return page


def of_the_paper() -> str:
    """The verdict of every claim of the paper, then each with its rule and what was found."""
    found = {claim: claim.findings(FIGURES) for claim in claims.OF_THE_PAPER}
    return "\n\n".join([verdicts(found), *(section(*each) for each in found.items())]) + "\n"


def through_time() -> str:
    """The verdict of every claim of ours, then the questions with their figures and claims."""
    found = {claim: claim.findings(FIGURES) for claim in claims.THROUGH_TIME}
    parts = [verdicts(found)]
    for word in THROUGH_TIME:
        asked = question(module_of(word))
        parts += [f"## {asked}", f"`{command(word)}`", f"![{asked}](../figures/{word}.png)"]
        parts += [section(*each) for each in found.items() if each[0].tables[0] == word]
    return "\n\n".join(parts) + "\n"


def verdicts(found: Mapping[Claim, Sequence[Finding]]) -> str:
    """A table of claims and verdicts."""
    rows = [
        f"| [{claim.name}](#{anchor(claim)}) | {in_cell(claim.claim)} | {overall(findings)} |"
        for claim, findings in found.items()
    ]
    return "\n".join(["| | claim | verdict |", "|---|---|---|", *rows])


def in_cell(text: str) -> str:
    """A text in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def anchor(claim: Claim) -> str:
    return claim.name.replace(" ", "-")


def section(claim: Claim, findings: Sequence[Finding]) -> str:
    """A claim with its rule, what was found, and where it is from."""
    lines = [f'### <a id="{anchor(claim)}"></a>{claim.name}. {claim.claim}', ""]
    lines += [f"- Paper: {claim.paper}."] if claim.paper else []
    lines.append(f"- Rule: {claim.rule}.")
    for finding in findings:
        head = f"{finding.head}: " if finding.head else ""
        lines.append(f"- {head}**{finding.verdict}**: {finding.numbers}.")
    tables = Tables(FIGURES)
    for name in claim.tables:
        recorded = "" if claim.command else tables.command(name)
        made = f", made by `{recorded}`" if recorded else ""
        lines.append(f"- Table: [`figures/{name}.csv`](../figures/{name}.csv){made}")
    lines += [f"- Command: `{claim.command}`"] if claim.command else []
    if claim.notebook:
        lines.append(f"- Notebook: [{claim.notebook}](../notebooks/{claim.notebook}.ipynb)")
    return "\n".join(lines)


def commands() -> str:
    """The table of the analyses' commands."""
    lines = ["| command | question | notebook |", "|---|---|---|"]
    for word in (*OF_THE_PAPER, *THROUGH_TIME):
        notebook = notebook_of(word)
        link = f"[{notebook.stem.partition('_')[0]}](notebooks/{notebook.name})"
        lines.append(f"| `{command(word)}` | {question(module_of(word))} | {link} |")
    return "\n".join(lines) + "\n"


def sites() -> str:
    """The table of sites."""
    rows = [f"| `{site}` | `{shape}` | {where} |" for site, (shape, where) in SITES.items()]
    return "\n".join(["| site | shape | where |", "|---|---|---|", *rows]) + "\n"


def questions() -> str:
    """The reference of all questions, with their options and columns."""
    parts = [
        "# Questions",
        "Made by `python docs/generate.py` from the folders in `bvit_interp/analyses`.",
        "Every command also takes the options for reading images at the end of this page, and"
        " `--ckpt`, `--data`, `--split`, `--out`, `--device`, `--overwrite` and `--download`.",
    ]
    for title, words in (
        ("The paper's figures and tables", OF_THE_PAPER),
        ("Questions that a shared block makes possible", THROUGH_TIME),
    ):
        parts.append(f"## {title}")
        for word in words:
            module = module_of(word)
            first, _, paragraph = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
            parts += [
                f"### `{command(word)}`",
                f"**{' '.join(first.split())}** {' '.join(paragraph.split())}",
                f"Notebook: [{notebook_of(word).name}](../notebooks/{notebook_of(word).name})."
                f" Figure: [{word}.png](../figures/{word}.png)."
                f" Method: `bvit_interp/analyses/{word}/measure.py`.",
                table(("option", "default", "meaning"), options(module.Config)),
                table(("column", "meaning"), list(module.COLUMNS.items())),
            ]
    parts.append("## Options for reading images")
    parts.append(table(("option", "default", "meaning"), options(LoaderOptions)))
    return "\n\n".join(part for part in parts if part) + "\n"


def house() -> str:
    """The tree of the package with the first sentence of every module."""
    parts = [
        "# The house",
        "Made by `python docs/generate.py` from the first line of every module. Rooms are listed"
        " from the top; imports point only downwards (`make lint` checks it).",
    ]
    for name in FLOORS:
        path = PACKAGE / name
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        lines = [f"## {name}" + ("" if path.is_file() else "/")]
        for file in files:
            where = file.relative_to(path if path.is_dir() else PACKAGE)
            lines.append(f"- `{where}`: {caption(file)}")
        parts.append("\n".join([lines[0], "", *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose first column is code; empty without rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for first, *others in rows:
        cells = [
            f"`{first}`",
            *(in_cell(str(cell)) for cell in others),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options(config: type) -> list[tuple[str, str, str]]:
    """Option, default and text of each field of a Config, without those for reading images."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base) and (base is config or base is not LoaderOptions):
            texts |= field_texts(base)
    return [
        (f"--{field.name.replace('_', '-')}", shown(field.default), texts[field.name])
        for field in dataclasses.fields(config)
        if field.name in texts
    ]


def field_texts(config: type) -> dict[str, str]:
    """The text under each field in the body of a dataclass."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(after, ast.Expr), f"{config}: {field.target.id} has no text"
            texts[field.target.id] = ast.literal_eval(after.value)
    return texts


def shown(default: object) -> str:
    """A default as it is typed on the command line."""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None else str(default)


def command(word: str) -> str:
    return f"bvit-interp {word.replace('_', '-')}"


def module_of(word: str) -> ModuleType:
    return importlib.import_module(f"bvit_interp.analyses.{word}")


def question(module: ModuleType) -> str:
    return " ".join((module.__doc__ or "").partition("\n\n")[0].split())


def notebook_of(word: str) -> Path:
    (path,) = (ROOT / "notebooks").glob(f"???[0-9][0-9]_{word}.ipynb")
    return path


def caption(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return re.sub(r"\s+", " ", text.partition("\n\n")[0])


if __name__ == "__main__":
    main()
