"""Clones modules around the same tensors."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn


def tensors_of(model: nn.Module) -> dict[int, Any]:
    """Every tensor of the model by id: parameters, buffers, and plain attributes of modules, such
    as the weights that pruning computes.

    With this dictionary as its memo, `copy.deepcopy` shares the tensors.
    """
    attributes = (value for module in model.modules() for value in vars(module).values())
    # deepcopy refuses tensors that are not leaves
    plain = (value for value in attributes if isinstance(value, torch.Tensor))
    return {
        id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers(), plain)
    }


def clone(module: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """A copy of a module whose tensors are those of `shared`."""
    return copy.deepcopy(module, dict(shared))
