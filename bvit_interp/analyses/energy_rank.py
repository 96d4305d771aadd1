"""How many directions do the FFN's weights and the CLS token use, step by step?

Fig. 6, section 4.1.3 and Appendix A.2 of bViT (arXiv 2605.10661): the smallest k whose first k squared singular
values hold 95 % of their sum, ``E_k = sum_{i<=k} s_i^2 / sum_i s_i^2``, of the FFN's in- and out-projection and of
the matrix whose rows are the CLS tokens after a step. The null beside each is the rank expected of a random
matrix of the same shape (Marchenko & Pastur, 1967): a weight near it is close to unstructured. The paper does
not say whether the CLS matrix is centred; by default it is not, as the weights are not.

Cost: one forward an image, streamed as float64 Gram matrices in constant memory.
Expected: around 600 of 768 for bViT-B (its random 3072 x 768 null is 661), lower in the early blocks of ViT-B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
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
    "rows": "rows of the matrix (for cls, images)",
    "columns": "columns of the matrix",
    "energy": "share of the squared singular values held, 0..1",
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

    known: dict[int, int] = {}
    rows = []
    for matrix in ("fc1", "fc2"):
        for t, block in enumerate(probe.model.blocks, start=1):
            weight = block.mlp.get_submodule(matrix).weight
            if id(weight) not in known:
                known[id(weight)] = _rank(torch.linalg.svdvals(weight.detach().double()), config)
            rows.append(_row(name, matrix, t, known[id(weight)], tuple(weight.shape), config))
    return rows


def _cls_rows(name: str, moments: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    from bvit_interp.metrics import singular_values_of_gram

    gram, images = moments["centred" if config.centred else "gram"], int(moments["count"])
    values = singular_values_of_gram(gram)
    shape = (images, gram.shape[-1])
    return [_row(name, "cls", t, _rank(v, config), shape, config) for t, v in enumerate(values, start=1)]


def _rank(singular_values: Any, config: Config) -> int:
    from bvit_interp.metrics import energy_rank

    return int(energy_rank(singular_values, config.energy))


def _row(name: str, matrix: str, step: int, rank: int, shape: tuple[int, int], config: Config) -> dict[str, Any]:
    from bvit_interp.metrics import random_energy_rank

    return {
        "model": name, "matrix": matrix, "step": step, "rank": rank, "share": rank / min(shape),
        "random_rank": random_energy_rank(*shape, config.energy), "full_rank": min(shape),
        "rows": shape[0], "columns": shape[1], "energy": config.energy,
    }  # fmt: skip


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 6: rank against step, one panel a matrix, with the random-matrix null."""
    from bvit_interp import plotting

    titles = {"fc1": "FFN in-projection", "fc2": "FFN out-projection", "cls": "CLS token"}
    figure, axes = plotting.canvas(columns=3, width=3.7)
    for ax, (matrix, title) in zip(axes[0], titles.items(), strict=True):
        of_matrix = frame[frame["matrix"] == matrix]
        nulls = set()
        for i, (name, part) in enumerate(of_matrix.groupby("model", sort=False)):
            ax.plot(part["step"], part["rank"], **plotting.line_style(i), label=name)
            nulls |= {(part["random_rank"].iloc[0], part["full_rank"].iloc[0])}
        for random_rank, full_rank in sorted(nulls):
            ax.axhline(random_rank, **plotting.NULL, label=f"random matrix: {random_rank} of {full_rank}")
        ax.set_title(title, fontsize=10)
        ax.set_ylim(bottom=0)
        plotting.step_axis(ax, of_matrix["step"])
        plotting.legend(ax)
    axes[0, 0].set_ylabel(f"rank at {frame['energy'].iloc[0]:.0%} energy")
    return figure
