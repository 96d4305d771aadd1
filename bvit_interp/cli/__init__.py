"""The command line: `bvit-interp WORD ...` reads options, runs, writes; no arithmetic."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from bvit_interp import __version__
from bvit_interp.cli.commands import execute, find, overview
from bvit_interp.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 a user's error, 130 interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    if given[0] == "--version":
        print(f"bvit-interp {__version__}")
        return 0
    try:
        command, rest = find(given)
        execute(command, rest)
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
