"""The command line: `bvit-interp WORD ...` reads options, runs, writes; no arithmetic."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from bvit_interp import __version__
from bvit_interp.analyses import ANALYSES, OF_THE_PAPER, THROUGH_TIME
from bvit_interp.cli import analyse, datasets, exits, tickets, train
from bvit_interp.cli import transfer as transferring
from bvit_interp.errors import UserError, choices


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 a user's error, 130 interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        print(f"bvit-interp {__version__}")
        return 0
    try:
        _dispatch(given[0], given[1:])
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"bvit-interp: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("bvit-interp: interrupted; what was saved is kept", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if debug or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"bvit-interp: error: another process stopped, or this one: {cause}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _commands() -> dict[str, Callable[[list[str]], None]]:
    """Word -> function of its arguments."""
    commands: dict[str, Callable[[list[str]], None]] = {}
    for word in ANALYSES:
        commands[word.replace("_", "-")] = lambda given, word=word: analyse.analyse(word, given)  # type: ignore[misc]
    made = {
        "train": train.train,
        "study": train.study,
        "prune": train.prune,
        "tickets": tickets.tickets,
    }
    made["early-exit"] = (
        exits.early_exit
    )  # an analysis, and what it analyses is made by `early-exit train`
    made["transfer"] = transferring.transfer
    return commands | made | {"data": datasets.data, "report": analyse.report}


def _dispatch(word: str, given: list[str]) -> None:
    commands = _commands()
    if word not in commands:
        raise UserError(f"no command {word!r}; commands: {choices(commands)}")
    commands[word](given)


def _overview() -> str:
    made = {
        "train": str(train.Train.__doc__),
        "study": str(train.Study.__doc__),
        "prune": str(train.Prune.__doc__),
        "tickets": str(tickets.Options.__doc__),
        "early-exit train": str(exits.Train.__doc__),
        "transfer": str(transferring.Transfer.__doc__),
    }
    others = {
        "data": "List data sets (data list) or write one (data export).",
        "report": str(analyse.Report.__doc__),
    }
    groups = {
        "The paper's figures and tables": _questions(OF_THE_PAPER),
        "Through time": _questions(THROUGH_TIME),
        "Weights": made,
        "Data and reports": others,
    }
    listed = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {word:<17} {text}" for word, text in rows.items())])
        for title, rows in groups.items()
    )
    return (
        "usage: bvit-interp WORD [options]     (bvit-interp WORD --help tells the options)\n\n"
        "Follow heads and neurons through the steps of a recurrent Vision Transformer.\n\n"
        f"{listed}\n\n--debug shows the traceback of an error; --version the version."
    )


def _questions(words: Sequence[str]) -> dict[str, str]:
    return {word.replace("_", "-"): analyse.question(analyse.module_of(word)) for word in words}
