"""How many directions do the FFN's weights and the CLS token use, step by step?

Fig. 6, section 4.1.3 and Appendix A.2 of bViT (arXiv 2605.10661): the smallest k whose first k
squared singular values hold 95 % of their sum, ``E_k = sum_{i<=k} s_i^2 / sum_i s_i^2``, of the
FFN's in- and out-projection and of the matrix whose rows are the CLS tokens after a step. The null
beside each is the rank expected of a random matrix of the same shape (Marchenko & Pastur, 1967): a
weight near it is close to unstructured. The paper does not say whether the CLS matrix is centred;
by default it is not, as the weights are not. Then one direction, the mean CLS token, may hold most
of the energy: `mean_share` (ours) says how much, and a rank that grows while this falls need not
grow with `--centred`.

Cost: one forward an image, streamed as float64 Gram matrices in constant memory. Expected: around
600 of 768 for bViT-B (its random 3072 x 768 null is 661), lower in the early blocks of ViT-B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer

from bvit_interp.analyses.energy_rank import COLUMNS, Config
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics import energy_rank, random_energy_rank, singular_values_of_gram
from bvit_interp.metrics.streaming.statistics import Gram
from bvit_interp.probes.probe import Probe


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
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
    devices = {name: next(model.parameters()).device for name, model in models.items()}
    grams = {
        name: Gram(p.num_steps, p.model.embed_dim).to(devices[name]) for name, p in probes.items()
    }
    loader, geometries = config.loader(data, models, "energy-rank")
    for batch in loader:
        for name, probe in probes.items():
            with torch.inference_mode():
                tokens = run_in_halves(
                    lambda part, p=probe, g=geometries[name], d=devices[name]: p.record(
                        part.views[g][0].to(d), "resid_post", tokens="cls"
                    )["resid_post"],
                    batch,
                )
            for part in tokens:
                grams[name].update(part)
    rows = []
    for name, probe in probes.items():
        rows += _weight_rows(name, probe, config) + _cls_rows(name, grams[name].compute(), config)
    return pd.DataFrame(rows)[list(COLUMNS)]


def _weight_rows(name: str, probe: Probe, config: Config) -> list[dict[str, Any]]:
    """Ranks of the FFN weights; a weight shared by several steps is decomposed once."""
    known: dict[
        Any, int
    ] = {}  # the tensors themselves as keys: the id of a masked one, made at every look, comes back
    rows = []
    for matrix in ("fc1", "fc2"):
        for t, block in enumerate(probe.model.blocks, start=1):
            weight = block.mlp.get_submodule(matrix).weight
            if weight not in known:
                known[weight] = _rank(torch.linalg.svdvals(weight.detach().double()), config)
            rows.append(_row(name, matrix, t, known[weight], tuple(weight.shape), config))
    return rows


def _cls_rows(name: str, moments: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    images, energy = int(moments["count"]), moments["gram"].diagonal(dim1=1, dim2=2).sum(-1)
    if config.centred and images < 2:
        raise UserError(
            "the CLS tokens of one image have no rank about their mean; give two images or more"
        )
    mean_share = 1 - moments["centred"].diagonal(dim1=1, dim2=2).sum(-1) / energy
    gram = moments["centred" if config.centred else "gram"]
    shape = (images - config.centred, gram.shape[-1])
    return [
        _row(name, "cls", t, _rank(values, config), shape, config, float(mean))
        for t, (values, mean) in enumerate(
            zip(singular_values_of_gram(gram), mean_share, strict=True), start=1
        )
    ]


def _rank(singular_values: Any, config: Config) -> int:
    return int(energy_rank(singular_values, config.energy))


def _row(
    name: str,
    matrix: str,
    step: int,
    rank: int,
    shape: tuple[int, int],
    config: Config,
    mean_share: float = math.nan,
) -> dict[str, Any]:
    return {
        "model": name,
        "matrix": matrix,
        "step": step,
        "rank": rank,
        "share": rank / min(shape),
        "random_rank": random_energy_rank(*shape, config.energy),
        "full_rank": min(shape),
        "rows": shape[0],
        "columns": shape[1],
        "energy": config.energy,
        "mean_share": mean_share,
    }


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """All of it."""
    return frame
