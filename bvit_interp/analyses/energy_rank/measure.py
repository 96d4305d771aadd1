"""How many directions do the FFN's weights and the CLS token use, step by step?

Fig. 6, section 4.1.3 and Appendix A.2 of bViT (arXiv 2605.10661): the smallest k whose first k squared singular
values hold 95 % of their sum, ``E_k = sum_{i<=k} s_i^2 / sum_i s_i^2``, of the FFN's in- and out-projection and of
the matrix whose rows are the CLS tokens after a step. The null beside each is the rank expected of a random
matrix of the same shape (Marchenko & Pastur, 1967): a weight near it is close to unstructured. The paper does
not say whether the CLS matrix is centred; by default it is not, as the weights are not. Then one direction, the mean
CLS token, may hold most of the energy: `mean_share` (ours) says how much, and a rank that grows while this falls need
not grow with `--centred`.

Cost: one forward an image, streamed as float64 Gram matrices in constant memory.
Expected: around 600 of 768 for bViT-B (its random 3072 x 768 null is 661), lower in the early blocks of ViT-B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer

    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the energy rank."""

    energy: float = 0.95
    """Share of the squared singular values to hold, 0..1."""
    centred: bool = False
    """Take the mean CLS token off before the rank; weights are never centred."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise UserError(f"energy must be in (0, 1], got {self.energy}")


COLUMNS = {
    "model": "checkpoint",
    "matrix": "fc1 (in-projection), fc2 (out-projection) or cls (CLS token after the step)",
    "step": "step t, from 1; the weights of a bViT are the same at every step",
    "rank": "energy rank: singular values needed",
    "share": "rank / largest possible rank, 0..1",
    "random_rank": "null: energy rank of a random Gaussian matrix of this shape",
    "full_rank": "largest possible rank, min(rows, columns)",
    "rows": "rows of the matrix (for cls, images; one less if centred, for the mean takes one dimension)",
    "columns": "columns of the matrix",
    "energy": "share of the squared singular values held, 0..1",
    "mean_share": "share of the squared entries that is the mean CLS token's, before centring, 0..1; none for weights",
}


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
    import pandas as pd
    import torch

    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.probe import Probe
    from bvit_interp.probes.reducers import Gram

    probes = {name: Probe(model) for name, model in models.items()}
    devices = {name: next(model.parameters()).device for name, model in models.items()}
    grams = {name: Gram(p.num_steps, p.model.embed_dim).to(devices[name]) for name, p in probes.items()}
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
    import torch

    known: dict[Any, int] = {}  # the tensors themselves as keys: the id of a masked one, made at every look, comes back
    rows = []
    for matrix in ("fc1", "fc2"):
        for t, block in enumerate(probe.model.blocks, start=1):
            weight = block.mlp.get_submodule(matrix).weight
            if weight not in known:
                known[weight] = _rank(torch.linalg.svdvals(weight.detach().double()), config)
            rows.append(_row(name, matrix, t, known[weight], tuple(weight.shape), config))
    return rows


def _cls_rows(name: str, moments: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    from bvit_interp.metrics import singular_values_of_gram

    images, energy = int(moments["count"]), moments["gram"].diagonal(dim1=1, dim2=2).sum(-1)
    if config.centred and images < 2:
        raise UserError("the CLS tokens of one image have no rank about their mean; give two images or more")
    mean_share = 1 - moments["centred"].diagonal(dim1=1, dim2=2).sum(-1) / energy
    gram = moments["centred" if config.centred else "gram"]
    shape = (images - config.centred, gram.shape[-1])
    return [
        _row(name, "cls", t, _rank(values, config), shape, config, float(mean))
        for t, (values, mean) in enumerate(zip(singular_values_of_gram(gram), mean_share, strict=True), start=1)
    ]


def _rank(singular_values: Any, config: Config) -> int:
    from bvit_interp.metrics import energy_rank

    return int(energy_rank(singular_values, config.energy))


def _row(
    name: str, matrix: str, step: int, rank: int, shape: tuple[int, int], config: Config, mean_share: float = math.nan
) -> dict[str, Any]:
    from bvit_interp.metrics import random_energy_rank

    return {
        "model": name, "matrix": matrix, "step": step, "rank": rank, "share": rank / min(shape),
        "random_rank": random_energy_rank(*shape, config.energy), "full_rank": min(shape),
        "rows": shape[0], "columns": shape[1], "energy": config.energy, "mean_share": mean_share,
    }  # fmt: skip


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 6: rank against step, one panel a matrix, with the random-matrix nulls; shares where widths differ."""
    from bvit_interp import plotting

    titles = {"fc1": "FFN in-projection", "fc2": "FFN out-projection", "cls": "CLS token"}
    names = list(dict.fromkeys(frame["model"]))
    one_width = frame.loc[frame["matrix"] == "fc1", "full_rank"].nunique() == 1
    figure, axes = plotting.canvas(columns=3, width=3.9, height=3.5)
    for ax, (matrix, title) in zip(axes[0], titles.items(), strict=True):
        of_matrix = frame[frame["matrix"] == matrix]
        scale = 1.0 if one_width else of_matrix["full_rank"]
        for i, name in enumerate(names):
            part = of_matrix[of_matrix["model"] == name]
            # equal ranks lie on each other: markers take turns
            turns = (i, len(names)) if len(part) >= 2 * len(names) else 1
            y = (of_matrix["rank"] / scale)[part.index]
            ax.plot(part["step"], y, **plotting.line_style(i), markevery=turns, label=name)
        _draw_nulls(ax, of_matrix, one_width)
        ax.set_title(title, fontsize=10)
        plotting.step_axis(ax, of_matrix["step"])
    measured = "rank" if one_width else "rank / full rank"
    axes[0, 0].set_ylabel(f"{measured} at {frame['energy'].iloc[0]:.0%} energy")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=min(len(names) + 1, 5), frameon=False, fontsize=8)
    return figure


def _draw_nulls(ax: Axes, of_matrix: pd.DataFrame, one_width: bool) -> None:
    """A thin grey line a shape of matrix, and above the highest what they stand for."""
    from bvit_interp import plotting

    nulls = of_matrix[["full_rank", "random_rank"]].drop_duplicates().sort_values("full_rank")
    heights = nulls["random_rank"] / (1 if one_width else nulls["full_rank"])
    for i, height in enumerate(heights):
        ax.axhline(height, **plotting.NULL, label=None if i else "random matrix of the same shape")
    told = "random: " + ", ".join(f"{null.random_rank} of {null.full_rank}" for null in nulls.itertuples())
    top = heights.max()
    ax.annotate(
        told, (1, top), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="bottom",
        color=plotting.NULL["color"], fontsize=8,
    )  # fmt: skip
    ax.set_ylim(0, 1.12 * max(top, of_matrix["rank" if one_width else "share"].max()))
