"""The errors that users meet, one line each."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """An input of the user cannot be used; the command line prints one line and exits with 2."""


class CheckpointError(UserError):
    """A checkpoint is missing or truncated, belongs to another model, or holds code or NaN."""


class DataError(UserError):
    """A data set is missing, empty or inconsistent, or has an image that cannot be read."""


class MissingExtra(UserError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed: pip install 'bvit-interp[{extra}]'")


REFUSALS = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    LookupError,
    ArithmeticError,
)
"""What constructors of other libraries raise for arguments that do not fit."""


def first_line(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def choices(values: Iterable[object], most: int = 12) -> str:
    """The valid choices as one string, at most `most` of them and then their number."""
    listed = [str(value) for value in values]
    return ", ".join(listed[:most]) + (
        f", ... ({len(listed)} in all)" if len(listed) > most else ""
    )
