"""Tensors in a safetensors file, with facts about them as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bvit_interp.results import replacing

UNREADABLE = (
    SafetensorError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,  # RecursionError is one
)
"""What reading a damaged file, and using its facts, may raise."""


def write(path: Path, key: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write or replace the file. All facts are under one key: two would have a random order."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(kept, str(temporary), metadata={key: json.dumps(about)})
        temporary.chmod(0o644)  # safetensors lets only the owner read it


def read(path: Path, key: str) -> tuple[Any, dict[str, Tensor]]:
    """What `write` has written: facts and tensors. Raises one of `UNREADABLE` for another file."""
    with safe_open(str(path), "pt") as file:
        about = json.loads((file.metadata() or {})[key])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
