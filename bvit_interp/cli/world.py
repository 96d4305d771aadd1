"""The processes that torchrun started, as the environment says."""

from __future__ import annotations

import os

from bvit_interp.errors import UserError


def world_size() -> int:
    """The number of processes; 1 without torchrun.

    Raises
    ------
    UserError
        If WORLD_SIZE is no whole number above 0.
    """
    return _number("WORLD_SIZE", "1", 1)


def check_torchrun() -> None:
    """Refuse an environment in which the processes would not find each other.

    Raises
    ------
    UserError
        For variables of torchrun that are missing or wrong; the line names them.
    """
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {world_size()} without {', '.join(missing)}: start several processes"
            " with torchrun, or unset WORLD_SIZE"
        )
    rank = _number("RANK", "", 0)
    if rank >= world_size():
        raise UserError(f"RANK must be below WORLD_SIZE ({world_size()}), got {rank}")
    port = _number("MASTER_PORT", "", 0)
    if port > 65_535:
        raise UserError(f"MASTER_PORT must be in 0..65535, got {port}")


def local_rank() -> int:
    """The number of this process on its machine, which is its GPU."""
    return _number("LOCAL_RANK", "", 0)


def _number(name: str, default: str, lowest: int) -> int:
    text = os.environ.get(name, default).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < lowest:
        raise UserError(
            f"the environment variable {name} must be a whole number >= {lowest}, got {text!r}"
        )
    return int(text)
