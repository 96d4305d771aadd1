"""Which models the images of the data sets fit."""

from __future__ import annotations

from typing import Any

from bvit_interp.errors import CheckpointError


def check_channels(model: Any, spec: str) -> Any:
    """The model, if it takes images of three channels, as all data sets have.

    Raises
    ------
    CheckpointError
        For a model of another number of channels; from Python it runs on tensors of its own.
    """
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise CheckpointError(
            f"{spec}: the model takes images of {channels} channels, the data sets have 3; in"
            " Python, Probe takes tensors of any number"
        )
    return model
