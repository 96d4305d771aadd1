"""The words of the command line: their options, and what runs them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from bvit_interp.analyses import ANALYSES, OF_THE_PAPER, THROUGH_TIME
from bvit_interp.cli.options.analysis import Inputs
from bvit_interp.cli.options.data import Export, Listing
from bvit_interp.cli.options.demo import Demo
from bvit_interp.cli.options.exits import ExitTraining
from bvit_interp.cli.options.report import Report
from bvit_interp.cli.options.shared import Machine, RecipeChanges
from bvit_interp.cli.options.sparsity import Pruning, TicketSearch
from bvit_interp.cli.options.training import Study, Training
from bvit_interp.cli.options.transfer import Target
from bvit_interp.cli.parsing import parse
from bvit_interp.errors import UserError, choices
from bvit_interp.training.adapting import exit_plan, transfer_plan
from bvit_interp.training.pruning.step_plan import StepPlan
from bvit_interp.training.pruning.ticket_plan import TicketPlan

USAGE = """\
usage: bvit-interp WORD [options]     (bvit-interp WORD --help lists the options)

Follow heads and neurons through the steps of a recurrent Vision Transformer.
"""


@dataclass(frozen=True)
class Command:
    """A word of the command line.

    Attributes
    ----------
    word : one word, or two.
    text : what ``--help`` prints above the options; its first paragraph stands in the overview.
    options : name -> dataclass of a group of options. The instances go to the runner by name.
    runner : the module of `cli.run` whose ``run`` does the work.
    constants : further arguments of ``run``.
    """

    word: str
    text: str
    options: Mapping[str, type]
    runner: str
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first paragraph of the text, in one line."""
        return " ".join(self.text.split("\n\n")[0].split())


def _made(word: str, runner: str, **options: type) -> Command:
    """A command that is described by the docstring of its first group of options."""
    described = next(iter(options.values()))
    return Command(word, described.__doc__ or "", options, runner)


WEIGHTS = (
    _made("train", "train", training=Training, changes=RecipeChanges, machine=Machine),
    _made("study", "study", study=Study, changes=RecipeChanges, machine=Machine),
    _made("prune", "prune", pruning=Pruning, plan=StepPlan, changes=RecipeChanges, machine=Machine),
    _made(
        "tickets",
        "tickets",
        search=TicketSearch,
        plan=TicketPlan,
        changes=RecipeChanges,
        machine=Machine,
    ),
    _made(
        "early-exit train",
        "train_exits",
        training=ExitTraining,
        plan=exit_plan.Plan,
        machine=Machine,
    ),
    _made("transfer", "transfer", target=Target, plan=transfer_plan.Plan, machine=Machine),
)
DATA = (
    _made("data list", "data_list", listing=Listing),
    _made("data export", "data_export", export=Export),
    _made("report", "report", report=Report),
    _made("demo", "demo", demo=Demo),
)
MADE = {command.word: command for command in (*WEIGHTS, *DATA)}


def question(word: str) -> Command:
    """The command of an analysis, from its folder."""
    module = _folder(word)
    return Command(
        word.replace("_", "-"),
        module.__doc__ or "",
        {"inputs": Inputs, "config": module.Config},
        "analysis",
        {"analysis": word},
    )


def find(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that the arguments begin with, and the arguments that are left.

    Raises
    ------
    UserError
        If there is no such command.
    """
    word, *rest = arguments
    pair = " ".join(arguments[:2])
    if pair in MADE:
        return MADE[pair], rest[1:]
    if word in MADE:
        return MADE[word], rest
    if word in _questions():
        return question(_questions()[word]), rest
    if second := [made.split()[1] for made in MADE if made.startswith(f"{word} ")]:
        raise UserError(f"{word} takes {' or '.join(second)}: bvit-interp {word} {second[0]}")
    words = [*_questions(), *MADE]
    close = difflib.get_close_matches(word, words, n=1)
    meant = f", did you mean {close[0]}?" if close else ";"
    raise UserError(f"no command {word!r}{meant} commands: {choices(words, 40)}")


def execute(command: Command, arguments: Sequence[str]) -> None:
    """Read the options of a command and run it. Only now is anything heavy imported."""
    options = parse(command.word, command.text, command.options, arguments)
    runner = importlib.import_module(f"bvit_interp.cli.run.{command.runner}")
    runner.run(**options, **command.constants)


def overview() -> str:
    """All commands, each with its summary."""
    groups = {
        "The paper's figures and tables": [question(word) for word in OF_THE_PAPER],
        "Through time": [question(word) for word in THROUGH_TIME],
        "Weights": WEIGHTS,
        "Data and reports": DATA,
    }
    parts = [USAGE]
    for title, commands in groups.items():
        lines = [f"  {command.word:<17} {command.summary}" for command in commands]
        parts.append("\n".join([f"{title}:", *lines]) + "\n")
    parts.append("--debug shows the traceback of an error; --version shows the version.")
    return "\n".join(parts)


def _questions() -> dict[str, str]:
    """Command of each analysis -> its word."""
    return {word.replace("_", "-"): word for word in ANALYSES}


def _folder(word: str) -> ModuleType:
    return importlib.import_module(f"bvit_interp.analyses.{word}")
