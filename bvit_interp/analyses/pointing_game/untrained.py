"""The same model with random weights: what an architecture does untrained.

The weights are drawn by their shape and order, not by the model's class or the names of its parts.
So the same model written in another class gets the same weights, on every device.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from bvit_interp.models.tied import tensors_of

_STD = 0.02  # of a ViT's weights (timm, and the first ViT)
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def untrained(model: AnyModel, seed: int = 0) -> AnyModel:
    """A copy of the model with random weights; the model stays as it is.

    Matrices, filters and tokens are normal with a standard deviation of 0.02. Biases are 0, and
    other vectors of a module without parts (scales of a norm, LayerScale) are 1. Single numbers
    stay. Parameters that are tied stay tied.
    """
    # results of a computation, as pruning leaves them, cannot be copied; a forward replaces them
    computed = {key: tensor for key, tensor in tensors_of(model).items() if not tensor.is_leaf}
    twin = copy.deepcopy(model, computed)
    met: Counter[tuple[int, ...]] = Counter()
    done: set[int] = set()
    with torch.no_grad():
        for module in twin.modules():
            if callable(reset := getattr(module, "reset_running_stats", None)):
                reset()
            is_leaf = next(module.children(), None) is None
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in done or parameter.ndim == 0:
                    continue
                done.add(id(parameter))
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.ndim == 1 and is_leaf:
                    parameter.fill_(1)
                else:
                    shape = tuple(parameter.shape)
                    rng = np.random.default_rng([seed, met[shape], *shape])
                    drawn = _STD * rng.standard_normal(shape, dtype=np.float32)
                    parameter.copy_(torch.from_numpy(drawn))
                    met[shape] += 1
    return twin
