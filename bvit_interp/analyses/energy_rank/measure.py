"""Energy ranks of FFN weights and CLS tokens, beside random matrices.

Fig. 6, section 4.1.3 and Appendix A.2 of bViT (arXiv 2605.10661). The energy rank is the smallest k
whose first k squared singular values hold 95 % of their sum, ``E_k = sum_{i<=k} s_i^2 / sum_i
s_i^2``. It is measured for the FFN's in- and out-projection, and for the matrix whose rows are the
CLS tokens after a step. The null is the rank expected of a random matrix of the same shape
(Marchenko & Pastur, 1967): a weight near it is close to unstructured.

The paper does not say whether the CLS matrix is centred. By default it is not, because the weights
are not. One direction, the mean CLS token, may then hold most of the energy. `mean_share` (ours)
gives its share. Where this share falls, the rank can grow without a growing rank about the mean;
`--centred` shows that one.

Cost: one forward per image. CLS tokens are summed in float64 Gram matrices of constant size.
Expected: about 600 of 768 for bViT-B (a random 3072 x 768 matrix has 661), lower in the early
blocks of ViT-B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bvit_interp.analyses.energy_rank import COLUMNS, Config
from bvit_interp.data.samples import Samples
from bvit_interp.data.stream import ModelBatch, stream
from bvit_interp.errors import UserError
from bvit_interp.metrics import energy_rank, random_energy_rank, singular_values_of_gram
from bvit_interp.metrics.streaming.statistics import Gram
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.models.unroll import for_any_model
from bvit_interp.probes.probe import Probe
from bvit_interp.probes.sites import FFN_MATRICES, Step


@for_any_model
def measure(models: Mapping[str, Model], data: Samples, config: Config) -> pd.DataFrame:
    """Energy ranks of every model, matrix and step.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : images; their labels are not used.

    Returns
    -------
    A table of `COLUMNS`.
    """
    probes = {name: Probe(model) for name, model in models.items()}
    grams = {
        name: Gram(probe.num_steps, probe.model.embed_dim).to(device_of(probe.model))
        for name, probe in probes.items()
    }

    def cls_tokens(batch: ModelBatch) -> Tensor:
        return probes[batch.model].record(batch.images, "resid_post", tokens="cls")["resid_post"]

    for name, tokens in stream(models, data, config, cls_tokens, progress="energy-rank"):
        grams[name].update(tokens)
    rows: list[dict[str, Any]] = []
    for name, probe in probes.items():
        for row in (*_weight_rows(probe, config), *_cls_rows(grams[name], config)):
            rows.append({"model": name, **row})
    return pd.DataFrame(rows)[list(COLUMNS)]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All of it."""
    return frame


def _weight_rows(probe: Probe, config: Config) -> list[dict[str, Any]]:
    """Ranks of the FFN weights; a weight shared by several steps is decomposed once."""
    # keyed by the tensors: a masked weight is made at each access, and a freed id can come back
    known: dict[Tensor, int] = {}
    rows = []
    blocks = [Step(block) for block in probe.model.blocks]
    for matrix in FFN_MATRICES:
        for step, block in enumerate(blocks, start=1):
            owner, attribute = block.linear_of(matrix)
            weight: Tensor = getattr(owner, attribute).weight
            if weight not in known:
                singular_values = torch.linalg.svdvals(weight.detach().double())
                known[weight] = int(energy_rank(singular_values, config.energy))
            rows.append(_row(matrix, step, known[weight], tuple(weight.shape), config))
    return rows


def _cls_rows(gram: Gram, config: Config) -> list[dict[str, Any]]:
    """Ranks of the CLS tokens after each step, and the share of their energy in the mean."""
    moments = gram.compute()
    images, about_zero = int(moments["count"]), moments["gram"]
    if config.centred and images < 2:
        raise UserError(
            "the CLS tokens of one image have no rank about their mean; give two images or more"
        )
    mean_share = 1 - _trace(moments["centred"]) / _trace(about_zero)
    singular_values = singular_values_of_gram(moments["centred"] if config.centred else about_zero)
    # the mean takes one of the rows' dimensions
    shape = (images - config.centred, about_zero.shape[-1])
    return [
        _row("cls", step, int(energy_rank(values, config.energy)), shape, config, float(share))
        for step, (values, share) in enumerate(
            zip(singular_values, mean_share, strict=True), start=1
        )
    ]


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _row(
    matrix: str,
    step: int,
    rank: int,
    shape: tuple[int, ...],
    config: Config,
    mean_share: float = math.nan,
) -> dict[str, Any]:
    rows, columns = shape
    return {
        "matrix": matrix,
        "step": step,
        "rank": rank,
        "share": rank / min(shape),
        "random_rank": random_energy_rank(rows, columns, config.energy),
        "full_rank": min(shape),
        "rows": rows,
        "columns": columns,
        "energy": config.energy,
        "mean_share": mean_share,
    }
