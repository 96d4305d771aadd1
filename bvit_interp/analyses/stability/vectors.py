"""Vectors over all tokens of an image: random ones, norms, energy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def seeded_normal(
    index: Int[Tensor, " batch"], shape: Sequence[int], *seeds: int
) -> Float[Tensor, "batch ..."]:
    """Standard normal numbers that depend on the image and the seeds, not on the batch.

    Parameters
    ----------
    index : positions of the images in the data set.
    shape : of one image's numbers.
    seeds : further seeds of the generator.

    Returns
    -------
    ``(B, *shape)`` float64, on the device of `index`.
    """
    drawn = [
        np.random.default_rng((*seeds, position)).standard_normal(tuple(shape))
        for position in index.tolist()
    ]
    return torch.from_numpy(np.stack(drawn)).to(index.device)


def state_norms(states: Float[Tensor, "batch tokens width"]) -> Float[Tensor, " batch"]:
    """Norm of each image's state, with all its tokens as one vector."""
    return states.flatten(1).norm(dim=1)


def energy_shares(
    vectors: Float[Tensor, "batch tokens width"], kinds: Sequence[slice]
) -> Float[Tensor, "batch kinds"]:
    """Share of a vector's squared norm that lies in the tokens of each kind, 0..1.

    Parameters
    ----------
    kinds : the tokens of each kind.
    """
    energy = vectors.square().sum(-1)
    by_kind = torch.stack([energy[:, tokens].sum(1) for tokens in kinds], dim=1)
    return by_kind / energy.sum(1, keepdim=True)
