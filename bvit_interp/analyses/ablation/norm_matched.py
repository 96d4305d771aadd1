"""Random changes of a residual stream, as large as an ablation's.

Ours. An ablation changes what a sublayer adds to the residual stream. How much that changes the
answer follows how large the change is, and the size differs between steps and units by orders of
magnitude. Here the same sublayer's output is changed by as much in every token, in a direction that
means nothing. All tokens of an image share the direction: directions of their own would cancel
where a later step attends to many tokens, but the changes by an ablated unit do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bvit_interp.probes.probe import Edit
from bvit_interp.vocabulary import Address

OUTPUTS = {"z": "attn_out", "mlp_post": "mlp_out"}
"""Site of the units -> what their sublayer adds to the residual stream."""


def random_directions(
    index: Int[Tensor, " batch"],
    site: str,
    step: int,
    units: Sequence[int],
    width: int,
    draws: int = 1,
    seed: int = 0,
) -> Float[Tensor, "draws units batch width"]:
    """Unit vectors, uniform on the sphere, on the CPU.

    Each depends on the seed, the site, the step, the unit, the image and the number of the draw
    alone, so neither the batch nor the device matters, and more draws leave the first as they are.

    Parameters
    ----------
    index : positions of the images in the data set.
    site : a key of `OUTPUTS`.
    """
    number = list(OUTPUTS).index(site)
    drawn = [
        [
            np.random.default_rng((seed, number, step, unit, image)).standard_normal((draws, width))
            for image in index.tolist()
        ]
        for unit in units
    ]
    normal = torch.from_numpy(np.array(drawn, np.float32)).permute(2, 0, 1, 3)
    return normal / normal.norm(dim=-1, keepdim=True)


def move_as_far(directions: Float[Tensor, "draws variants batch width"]) -> Edit:
    """An edit of a sublayer's output that moves runs without ablation as far as ablated ones.

    Parameters
    ----------
    directions : unit vectors.

    Returns
    -------
    fn(activation ``((1 + draws) V B, N, D)``, address). The first V B rows are of the ablated runs
    and stay. The others are of as many intact runs per draw: each token moves along its direction
    by the norm of the difference between its ablated and its intact output.
    """
    draws, *per_draw = directions.shape[:3]

    def edit(activation: Tensor, address: Address) -> Tensor:
        runs = activation.unflatten(0, (1 + draws, *per_draw))
        ablated, intact = runs[:1], runs[1:]
        size = (ablated - intact).norm(dim=-1, keepdim=True)
        moved = intact + size * directions.to(activation)[..., None, :]
        return torch.cat([ablated, moved]).flatten(0, 2)

    return edit
