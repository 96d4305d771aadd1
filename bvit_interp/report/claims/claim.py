"""A claim, the rule that judges it, and what the tables say.

A `Claim` is written down before its tables are looked at: what is claimed, what the paper prints,
and the rule. `judge` reads shipped tables and applies the rule. Every number of a `Finding` is read
from a table, so that prose cannot say what no table holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from bvit_interp.errors import UserError
from bvit_interp.results import read_table

Verdict = Literal["held", "did not hold", "not testable"]


@dataclass(frozen=True)
class Finding:
    """What the tables say about a claim, or about one part of it.

    Attributes
    ----------
    verdict : by the claim's rule.
    numbers : what was found, as a clause; every number is read from a table.
    of : the model or the seed; empty for all of them.
    part : the part of the claim that is judged; empty for the whole claim.
    """

    verdict: Verdict
    numbers: str
    of: str = ""
    part: str = ""

    @property
    def head(self) -> str:
        """Which part of the claim is judged, of which model."""
        return ", ".join(filter(None, (self.of, self.part)))


class Tables:
    """The tables of a folder, each read once.

    Parameters
    ----------
    folder : the folder of shipped results, ``figures``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read = cache(lambda name: read_table(folder / f"{name}.csv"))

    def __call__(self, name: str) -> Any:
        """A table (a DataFrame), by its path in the folder without ``.csv``.

        It is typed `Any`: pandas' stubs cannot know that a label gives a number.
        """
        return self._read(name).copy()

    def command(self, name: str) -> str:
        """The command that made a table; empty where none is recorded."""
        about = (self.folder / name).with_suffix(".json")
        return str(json.loads(about.read_text())["command"]) if about.is_file() else ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and the rule that judges it.

    Attributes
    ----------
    name : number of the paper's claim, or the question's word and a letter.
    claim : the claim, as a clause.
    rule : when it held, when it did not, and what makes it not testable.
    judge : tables -> findings.
    tables : tables that are read, by their path in the folder without ``.csv``.
    paper : what the paper prints, and where; empty if the claim is not the paper's.
    command : how to test it, where no table is there.
    notebook : name of the notebook that shows it.
    """

    name: str
    claim: str
    rule: str
    judge: Callable[[Tables], Sequence[Finding]]
    tables: tuple[str, ...] = ()
    paper: str = ""
    command: str = ""
    notebook: str = ""

    def findings(self, folder: Path) -> list[Finding]:
        """Judge the claim by the tables of a folder.

        Raises
        ------
        UserError
            If a table is missing.
        """
        for name in self.tables:
            if not (folder / f"{name}.csv").is_file():
                raise UserError(f"claim {self.name} needs {folder / name}.csv")
        return list(self.judge(Tables(folder)))


def text(claim: Claim, folder: Path) -> str:
    """The claim, its rule and its findings in lines; the notebooks print it."""
    lines = [f"Claim {claim.name}: {claim.claim}"]
    if claim.paper:
        lines.append(f"Paper: {claim.paper}")
    lines.append(f"Rule: {claim.rule}")
    for finding in claim.findings(folder):
        head = f"{finding.head}: " if finding.head else ""
        lines.append(f"{head}{finding.verdict} ({finding.numbers})")
    return "\n".join(lines)


def overall(findings: Sequence[Finding]) -> str:
    """The verdict in a phrase: for each part of the claim, and how often it holds."""
    parts = {}
    for part in dict.fromkeys(finding.part for finding in findings):
        words = [finding.verdict for finding in findings if finding.part == part]
        kinds = list(dict.fromkeys(words))
        said = ", ".join(f"{word} in {words.count(word)} of {len(words)}" for word in kinds)
        parts[part] = kinds[0] if len(kinds) == 1 else said
    return "; ".join(f"{part}: {said}" if part else said for part, said in parts.items())


def untested(reason: str) -> Callable[[Tables], list[Finding]]:
    """The judge of a claim that nothing here can test."""
    return lambda _: [Finding("not testable", reason)]


def judged(holds: bool) -> Verdict:
    return "held" if holds else "did not hold"


def above(row: Any, low: Any, high: Any = None) -> Verdict:
    """Whether an interval lies above another one, or above a number.

    Held if it lies above, did not hold if it lies below, and not testable if the two overlap.
    """
    if row["low"] > (low if high is None else high):
        return "held"
    return "did not hold" if row["high"] < low else "not testable"


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number with fixed digits; a whole number with separators."""
    if digits == 0:
        return f"{round(value):,}"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def numbers(values: Iterable[Any], digits: int = 3, sign: bool = False) -> str:
    """Numbers, listed."""
    return ", ".join(number(value, digits, sign) for value in values)


def interval(row: Any, value: str = "value", digits: int = 3) -> str:
    """A value with its interval, from a row with the columns `value`, low and high."""
    return f"{row[value]:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def half_width(row: Any) -> float:
    """Half the width of an interval, from a row with the columns low and high."""
    return float(row["high"] - row["low"]) / 2


def recurrent(names: Iterable[str]) -> list[str]:
    """The bViTs among the models."""
    return [name for name in names if name.startswith("bvit")]


def stack_of(name: str) -> str:
    """The stack that was trained like a bViT, by its name."""
    return name.removeprefix("b")


def seed_of(name: str) -> str:
    """The part of a checkpoint's name that tells its seed, in words."""
    _, found, seed = name.partition("-seed")
    return f"seed {seed}" if found else "seed 0"
