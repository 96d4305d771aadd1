"""Parts of a linear probe: batches, an exact solver, random weights."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.training.loop.draws import seeded
from bvit_interp.training.loop.recipe import Recipe

_log = logging.getLogger(__name__)
Features = tuple[Float[Tensor, "images width"], Int[Tensor, " images"]]
"""Features of images, and their labels."""


def feature_batches(features: Features, recipe: Recipe, epoch: int) -> Iterator[Features]:
    """The batches of an epoch (from 0), in the order in which `feed.Epoch` shows the images.

    Each process gets whole batches.
    """
    inputs, labels = features
    permutation = np.random.default_rng([recipe.seed, epoch]).permutation(len(labels))
    order = torch.from_numpy(permutation).to(labels.device)
    for begin in range(0, len(labels) - recipe.batch_size + 1, recipe.batch_size):
        batch = order[begin : begin + recipe.batch_size]
        yield inputs[batch], labels[batch]


def exact_accuracy(train: Features, test: Features) -> float:
    """Test accuracy of logistic regression that is solved to its optimum, 0..1.

    It is multinomial, with an L2 penalty of C = 1, solved by L-BFGS. It checks the probe: a probe
    far below it has not converged, and one above it gains by stopping early.
    """
    solver = LogisticRegression(C=1.0, max_iter=2000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        solver.fit(train[0].double().cpu().numpy(), train[1].cpu().numpy())
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        _log.warning("the exact solver stopped before its optimum")
    return float(solver.score(test[0].double().cpu().numpy(), test[1].cpu().numpy()))


def with_random_weights(model: VisionTransformer, seed: int) -> VisionTransformer:
    """A copy of the model with random weights, drawn as for a new model.

    A probe of its features is a null for the trained weights.
    """
    twin = copy.deepcopy(model)
    with seeded(seed), torch.no_grad():
        for module in twin.modules():
            if module is not twin and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        twin.init_weights()
        for name, tensor in twin.named_parameters():
            if name.endswith("step_embed"):
                tensor.zero_()
    return twin
