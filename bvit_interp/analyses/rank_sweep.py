"""How much accuracy is left when the FFN's weights are cut to rank k?

Fig. 7, section 4.1.3 and Appendix A.2 of bViT (arXiv 2605.10661): both FFN matrices of every block are replaced by
their truncated SVD, ``W_k = U_k S_k V_k^T``, biases untouched, nothing retrained. Ranks are the paper's (64 to 768
at width 768), in proportion for other widths. At full rank the weights themselves are used, so the accuracy is
the model's own. `energy_fc1` and `energy_fc2` say how much of the weights' energy a rank keeps; `chance` is the
share of the most frequent class among the images.

Cost: one SVD a matrix and one forward an image and rank. Rows are written as they finish and the sweep continues
where it stopped.
Expected: in the paper bViT collapses below rank 600 or so, ViT later.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bvit_interp.data.reading import Reading
from bvit_interp.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from bvit_interp.data.samples import Samples
    from bvit_interp.results import Table

PAPER_RANKS = (64, 128, 256, 384, 512, 640, 702, 744, 760, 768)
PAPER_WIDTH = 768


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the rank sweep."""

    ranks: tuple[int, ...] | None = None
    """Ranks to cut to; by default the paper's, in proportion to the model's width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1):
            raise UserError(f"ranks must be >= 1, got {self.ranks}")

    def identity(self) -> dict[str, Any]:
        """Without the ranks: a sweep may be continued with more of them."""
        return {key: value for key, value in super().identity().items() if key != "ranks"}


COLUMNS = {
    "model": "checkpoint",
    "rank": "rank k both FFN matrices of every block are cut to",
    "share": "k / full rank, 0..1",
    "accuracy": "share of images classified right, 0..1",
    "low": "lower end of Wilson's 95 % interval",
    "high": "upper end of it",
    "n": "images",
    "energy_fc1": "share of the squared singular values kept in the in-projection, mean over blocks, 0..1",
    "energy_fc2": "the same in the out-projection",
    "chance": "null: share of the most frequent class among the images, 0..1",
}


def measure(
    models: Mapping[str, VisionTransformer], data: Samples, config: Config, table: Table | None = None
) -> pd.DataFrame:
    """Accuracy of every model at every rank.

    Parameters
    ----------
    models : name -> model; all see each image in one pass. Their weights are put back.
    data : labelled images.
    table : rows already there are not measured again; finished ones are added at once.

    Returns
    -------
    A table of `COLUMNS`; with `table`, all its rows.
    """
    import pandas as pd

    from bvit_interp.data.labels import label_map

    classes = {name: label_map(data, model) for name, model in models.items()}
    factors = {name: _decompose(model) for name, model in models.items()}
    ranks = {name: _ranks(name, model, config) for name, model in models.items()}
    rows: list[dict[str, Any]] = []
    for of_models in itertools.zip_longest(*ranks.values()):
        cut = {
            name: rank
            for name, rank in zip(models, of_models, strict=True)
            if rank is not None and not (table is not None and table.has(model=name, rank=rank))
        }
        counts = _count_hits({name: models[name] for name in cut}, cut, factors, classes, data, config) if cut else {}
        for name, rank in cut.items():
            rows.append(_row(name, rank, factors[name], *counts[name]))
            if table is not None:
                table.append(rows[-1])
    return pd.DataFrame(rows if table is None else table.rows)[list(COLUMNS)]


Factors = list[tuple[str, Any, "Tensor", "Tensor", "Tensor"]]
"""(fc1 or fc2, its Linear, U, S, V^T) of each distinct matrix."""


def _linears(model: VisionTransformer) -> Iterator[tuple[str, Any]]:
    for block in model.blocks.children():
        yield "fc1", block.mlp.fc1
        yield "fc2", block.mlp.fc2


def _decompose(model: VisionTransformer) -> Factors:
    import torch

    return [
        (name, linear, *torch.linalg.svd(linear.weight.detach().double(), full_matrices=False))
        for name, linear in _linears(model)
    ]


def _ranks(name: str, model: VisionTransformer, config: Config) -> list[int]:
    full = min(next(_linears(model))[1].weight.shape)
    if config.ranks is None:
        return sorted({max(round(rank * full / PAPER_WIDTH), 1) for rank in PAPER_RANKS})
    if max(config.ranks) > full:
        raise UserError(f"rank {max(config.ranks)} is above the full rank {full} of {name}; ranks: 1..{full}")
    return sorted(set(config.ranks))


@contextmanager
def _cut_to(rank: int, factors: Factors) -> Iterator[None]:
    """The weights cut to `rank` while the context lasts; untouched at full rank."""
    import torch

    originals = [linear.weight.detach().clone() for _, linear, *_ in factors]
    try:
        with torch.no_grad():
            for _, linear, u, s, vt in factors:
                if rank < len(s):
                    linear.weight.copy_(((u[:, :rank] * s[:rank]) @ vt[:rank]).to(linear.weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for (_, linear, *_), original in zip(factors, originals, strict=True):
                linear.weight.copy_(original)


def _count_hits(
    models: Mapping[str, VisionTransformer], cut: Mapping[str, int], factors: Mapping[str, Factors],
    classes: Mapping[str, Tensor], data: Samples, config: Config,
) -> dict[str, tuple[int, int, float]]:  # fmt: skip
    """Hits, images and chance of each model at its rank, in one pass over the images."""
    from contextlib import ExitStack

    import torch

    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.probes.reducers import Rows

    rows = {name: Rows() for name in models}
    loader, geometries = config.loader(data, models, "rank-sweep " + ", ".join(f"k={k}" for k in {*cut.values()}))
    with ExitStack() as stack, torch.inference_mode():
        for name, rank in cut.items():
            stack.enter_context(_cut_to(rank, factors[name]))
        for batch in loader:
            for name, model in models.items():

                def run(part: Any, name: str = name, model: Any = model) -> tuple[Tensor, Tensor]:
                    device = next(model.parameters()).device
                    predicted = model(part.views[geometries[name]][0].to(device)).argmax(-1).cpu()
                    wanted = classes[name][part.labels]
                    return part.index, torch.stack([predicted == wanted, wanted], dim=1)

                for index, row in run_in_halves(run, batch):
                    rows[name].update(index, row)
    counts = {}
    for name in models:
        hits, labels = rows[name].compute()[1].unbind(1)
        counts[name] = (int(hits.sum()), len(hits), int(labels.long().bincount().max()) / len(hits))
    return counts


def _row(name: str, rank: int, factors: Factors, hits: int, n: int, chance: float) -> dict[str, Any]:
    import numpy as np

    from bvit_interp.metrics import wilson_interval

    low, high = wilson_interval(hits, n)
    kept = {
        which: float(
            np.mean([float(s[:rank].square().sum() / s.square().sum()) for w, _, _, s, _ in factors if w == which])
        )
        for which in ("fc1", "fc2")
    }
    return {
        "model": name, "rank": rank, "share": rank / len(factors[0][3]), "accuracy": hits / n, "low": low, "high": high,
        "n": n, "energy_fc1": kept["fc1"], "energy_fc2": kept["fc2"], "chance": chance,
    }  # fmt: skip


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 7: accuracy against rank, with chance."""
    from bvit_interp import plotting

    figure, axes = plotting.canvas(width=5.2, height=3.6)
    ax = axes[0, 0]
    widths = frame.assign(full=(frame["rank"] / frame["share"]).round()).groupby("model")["full"].first()
    x = "rank" if widths.nunique() == 1 else "share"
    for i, (name, part) in enumerate(frame.groupby("model", sort=False)):
        part = part.sort_values("rank")
        style = plotting.line_style(i)
        ax.plot(part[x], part["accuracy"], **style, label=name)
        ax.fill_between(part[x], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)
    ax.axhline(frame["chance"].iloc[0], **plotting.NULL, label="chance: most frequent class")
    ax.set(xlabel="rank k" if x == "rank" else "rank k / width", ylabel="accuracy", ylim=(0, None))
    plotting.legend(ax)
    return figure
