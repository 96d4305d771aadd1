"""Refusal of NaN and infinite values."""

from __future__ import annotations

import torch
from torch import Tensor

from bvit_interp.errors import UserError


def check_finite(values: Tensor, what: str = "activations") -> Tensor:
    """Return the values unchanged if all of them are finite.

    Raises
    ------
    UserError
        If one of them is NaN or infinite; the message begins with `what`.
    """
    if not torch.isfinite(values).all():
        raise UserError(f"{what} hold NaN or infinite values")
    return values
