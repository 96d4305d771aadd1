"""Names to print, files to read, lines that are said once."""

from __future__ import annotations

import logging
import stat
from functools import lru_cache
from pathlib import Path

from bvit_interp.errors import DataError

_log = logging.getLogger(__name__)


def escaped(name: object) -> str:
    """A file's name as it can be printed; bytes that are not UTF-8 are written as ``\\xff``."""
    text = str(name)
    return (
        text
        if text.isascii()
        else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )


def expanded(path: str) -> Path:
    """A path with the home folder in place of ``~`` or ``~user``.

    Raises
    ------
    DataError
        If there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{escaped(path)}: no user has the home folder that ~ stands for") from None


def check_regular(path: Path) -> None:
    """Refuse pipes, devices and sockets, which may never end; a link to a file is a file.

    Raises
    ------
    DataError
        If the path is something else.
    OSError
        If there is nothing.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{escaped(path)}: not a regular file")


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty, without spaces around them.

    UTF-8 with or without a byte-order mark.

    Raises
    ------
    DataError
        If it is not a regular file or not UTF-8.
    """
    try:
        check_regular(file)
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{escaped(file)}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{escaped(file)}: cannot be read ({error.strerror})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


@lru_cache(maxsize=256)
def say(line: str) -> None:
    """Say a line on stderr, once per process."""
    _log.warning("%s", line)
