"""The type checker of the test run: calls into these modules are checked against their types."""

from __future__ import annotations

from pathlib import Path

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int passes as a float

_PACKAGE = Path(__file__).resolve().parents[1] / "bvit_interp"
_BY_HAND = {"probe"}  # these refuse wrong types with a message of their own
_MODELS = ("cost", "exits", "masks", "stepping")  # torch.fx traces the others with its own types
_PRUNING = ("criteria", "grafts", "masked_adam", "subnetworks", "ticket_table")


def modules() -> list[str]:
    """Names of the modules: metrics, probes, instruments, and some of the models."""
    rooms = ("metrics", "metrics/streaming", "probes", "analyses/*")
    files = [path for room in rooms for path in _PACKAGE.glob(f"{room}/*.py")]
    files += [_PACKAGE / "training" / "pruning" / f"{name}.py" for name in _PRUNING]
    files += [_PACKAGE / "models" / f"{name}.py" for name in _MODELS]
    return [
        ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
        for path in files
        if path.stem != "__init__" and path.stem not in _BY_HAND
    ]
