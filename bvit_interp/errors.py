"""The errors that users meet, one line each."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the command line prints it as one line and exits with
    2."""


class CheckpointError(UserError):
    """A checkpoint is missing, truncated, of another model, or holds code or NaN."""


class DataError(UserError):
    """A data set is missing, empty, inconsistent, or has an image that cannot be read."""


class MissingExtra(UserError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed: pip install 'bvit-interp[{extra}]'")


def choices(values: Iterable[object], most: int = 12) -> str:
    """The valid choices as one readable string, cut after `most`."""
    listed = [str(value) for value in values]
    return ", ".join(listed[:most]) + (
        f", ... ({len(listed)} in all)" if len(listed) > most else ""
    )
