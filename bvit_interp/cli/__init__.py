"""The command line: `bvit-interp WORD ...` reads options, runs, writes; no arithmetic."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from bvit_interp import __version__
from bvit_interp.cli.commands import execute, find, overview
from bvit_interp.errors import UserError

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Unable to allocate")
_NO_HOME = "Could not determine home directory"
_LONGEST = 300  # characters of a message that is not ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns
    -------
    The exit code: 0 done, 1 an error of the package's own, 2 a user's error, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    if given[0] == "--version":
        print(f"bvit-interp {__version__}")
        return 0
    word = given[0]
    try:
        command, rest = find(given)
        word = command.word
        execute(command, rest)
    except KeyboardInterrupt:
        if debug:
            raise
        print("bvit-interp: interrupted; what was saved is kept", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        code, text = _said(error, word)
        print(f"bvit-interp: {text}", file=sys.stderr)
        return code
    return 0


def _said(error: Exception, word: str) -> tuple[int, str]:
    """Exit code and line of an error."""
    line = _one_line(error)
    if isinstance(error, (UserError, OSError)):
        return 2, f"error: {line}"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(line):
        return 2, f"error: {word}: out of memory ({line}); take a smaller --batch-size or --limit"
    if isinstance(error, RuntimeError):
        if line.startswith(_NO_HOME):
            return 2, f"error: {word}: no such user behind ~ in a path ({line})"
        if os.environ.get("WORLD_SIZE", "1") != "1":
            cause = str(error).strip().partition("\n")[0] or type(error).__name__
            return 2, f"error: another process stopped, or this one: {cause}"
    kind = type(error).__name__
    return 1, f"internal error in {word}: {kind}: {line}; --debug shows it"


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, (UserError, OSError))  # as long as they need to be
    return line if known or len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
