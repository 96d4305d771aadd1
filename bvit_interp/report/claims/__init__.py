"""Claims judged by rules over the shipped tables."""

from __future__ import annotations

from pathlib import Path

from bvit_interp.errors import UserError, choices
from bvit_interp.report.claims import accuracy, inside, states, units, weights
from bvit_interp.report.claims.claim import Claim, text

__all__ = ["OF_THE_PAPER", "THROUGH_TIME", "judge"]

OF_THE_PAPER: tuple[Claim, ...] = tuple(
    sorted(
        (*accuracy.CLAIMS, *inside.CLAIMS, *weights.CLAIMS),
        key=lambda claim: (int(claim.name.rstrip("b")), claim.name),
    )
)
"""The testable claims of bViT (arXiv 2605.10661), in its order."""

THROUGH_TIME: tuple[Claim, ...] = (*units.CLAIMS, *states.CLAIMS)
"""Claims of our own about what happens from step to step."""


def judge(name: str, folder: str | Path = "figures") -> str:
    """Judge a claim by the tables of a folder, in the words of the documentation.

    Parameters
    ----------
    name : name of a claim in ``docs/reproduction.md`` ("9") or ``docs/through-time.md``
        ("lens 1").
    folder : the shipped tables.

    Raises
    ------
    UserError
        For an unknown name or a missing table.
    """
    known = {claim.name: claim for claim in (*OF_THE_PAPER, *THROUGH_TIME)}
    if name not in known:
        raise UserError(f"no claim {name!r}; claims: {choices(list(known), 60)}")
    return text(known[name], Path(folder))
