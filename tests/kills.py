"""Runs that are killed before one file operation after the other, and started again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """What a run that is killed raises; no handler of it can change a file any more."""


def is_killed(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    run: Callable[[], Any],
    operations: tuple[str, ...] = ("replace", "unlink"),
) -> bool:
    """Call `run`, and kill it before operation `number` (from 0); False if it ends before that."""
    count = 0

    def dying(plain: Callable) -> Callable:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == number:
                raise Killed
            count += 1
            return plain(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for name in operations:
            patch.setattr(Path, name, dying(getattr(Path, name)))
        try:
            run()
        except Killed:
            return True
    return False


def kills(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    run: Callable[[Path], Any],
    operations: tuple[str, ...] = ("replace", "unlink"),
) -> Iterator[tuple[Path, Any]]:
    """Folders in which ``run(folder)`` was killed, at each operation in turn, and what it gave when
    it was called again; in the last folder it had ended the first time."""
    for number in itertools.count():
        out = folder / f"killed-{number}"
        killed = is_killed(monkeypatch, number, lambda out=out: run(out), operations)
        yield out, run(out)
        if not killed:
            return


def contents(folder: Path) -> dict[str, bytes]:
    """Path of each file -> its content, without what killed processes leave."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".partial" not in str(path)
    }
