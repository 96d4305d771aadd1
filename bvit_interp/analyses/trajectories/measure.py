"""Which way does the CLS token go from step to step, and do its images part by class or by step?

Fig. 9 and Appendix E.2 of bViT (arXiv 2605.10661): the CLS token after every step of many images, brought to two
dimensions by PaCMAP (Wang et al., 2021), one panel a class, the colour the step. As the paper does not say how, one fit
holds all images and steps of a model, with the package's defaults; PCA stands beside it. What a picture of 2-D shows
may be the picture's own, so every point carries two checks, which are ours:

- `kept`: the share of its k nearest neighbours in CLS space that are also its k nearest in 2-D; chance is k / (n - 1);
- `staged`: the share of its k nearest neighbours among other images' points that are at most one step away, in 2-D and
  (`staged_cls`) in CLS space. Null: the steps of every other image permuted, which leaves the embedding as it is and
  gives 3 / T, or 2 / T at the first and last step. 2-D above CLS space is an artefact of the embedding. Staging is no
  sign of training: an untrained ViT has the most of it (0.99), as its images hardly differ;

`same_class` and `same_class_cls` are the same shares of the own class, with the share expected of labels permuted over
images; one sees at which step classes part.

Cost: one forward an image; n images x T x D float32 numbers are kept (0.37 GB for 10,000 images of bViT-B). PaCMAP
takes 3 s for 6000 points and 6.5 s for 12,000 on one core, neighbours grow with the square (12,000: 8 s). All images
of a large data set take hours: set `limit`.
Expected: neighbouring steps lie together and classes part over the steps, as in Fig. 9; the paper gives no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bvit_interp.data.reading import Reading
from bvit_interp.errors import MissingExtra, UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from timm.models.vision_transformer import VisionTransformer

    from bvit_interp.data.samples import Samples
    from bvit_interp.probes.statetable import StateTable

_METHODS = ("pacmap", "pca")
_MOST_CLASSES = 10
_MOST_MODELS = 3


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """Options of the trajectories."""

    steps: int | None = None
    """Steps to follow, from 1; by default those the model was made for. A stacked ViT stops at its last block."""
    methods: tuple[Literal["pacmap", "pca"], ...] = _METHODS  # type: ignore[assignment]
    """Embeddings: pacmap (the paper's), pca."""
    neighbours: int = 10
    """Neighbours k in the checks."""
    seed: int = 0
    """Of the embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps must be >= 1, got {self.steps}")
        if not self.methods or set(self.methods) - set(_METHODS) or len(set(self.methods)) < len(self.methods):
            raise UserError(f"methods must be one or more of {', '.join(_METHODS)}, got {self.methods}")
        if self.neighbours < 1:
            raise UserError(f"neighbours must be >= 1, got {self.neighbours}")
        if not 0 <= self.seed < 2**31 - 1:
            raise UserError(f"seed must be 0..{2**31 - 2}, got {self.seed}")

    def headline(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Means over images."""
        return (
            frame.groupby(list(frame)[: list(frame).index("image")], sort=False).mean(numeric_only=True).reset_index()
        )


COLUMNS = {
    "model": "checkpoint",
    "method": "pacmap or pca",
    "step": "step t, from 1",
    "image": "name of the image",
    "label": "its class",
    "x": "first coordinate, in the embedding's units",
    "y": "second coordinate",
    "kept": "share of the k nearest neighbours in CLS space that are among the k nearest in 2-D, 0..1",
    "kept_null": "null: chance, k / (n - 1) of n points",
    "staged": "share of the k nearest neighbours in 2-D among other images' points that are within one step, 0..1",
    "staged_cls": "the same in CLS space",
    "staged_null": "null: its mean with the steps of every other image permuted, 3 / T (2 / T at both ends)",
    "same_class": "share of the k nearest neighbours in 2-D among other images' points of the own class, 0..1",
    "same_class_cls": "the same in CLS space",
    "same_class_null": "null: its mean with the labels permuted over the other images",
    "neighbours": "k",
    "n": "images",
}


def measure(models: Mapping[str, VisionTransformer], data: Samples, config: Config) -> pd.DataFrame:
    """The points of every model, method, step and image.

    Parameters
    ----------
    models : name -> model; all see each image in one pass.
    data : labelled images.

    Returns
    -------
    A table of `COLUMNS`, one row a point.
    """
    import pandas as pd
    import torch

    from bvit_interp.data.loader import run_in_halves
    from bvit_interp.models.unroll import run_on
    from bvit_interp.probes.probe import Probe
    from bvit_interp.probes.statetable import StateTable

    _check_installed(config)
    probes = {name: Probe(run_on(model, config.steps or len(model.blocks))) for name, model in models.items()}
    tables = {name: StateTable(p.num_steps, p.model.embed_dim) for name, p in probes.items()}
    devices = {name: next(model.parameters()).device for name, model in models.items()}
    for name, table in tables.items():
        table.to(devices[name])
    loader, geometries = config.loader(data, models, "trajectories")
    for batch in loader:
        for name, probe in probes.items():
            with torch.inference_mode():
                parts = run_in_halves(
                    lambda part, p=probe, g=geometries[name], d=devices[name]: (
                        part.index, part.labels,
                        p.record(part.views[g][0].to(d), "resid_post", tokens="cls")["resid_post"],
                    ),
                    batch,
                )  # fmt: skip
            for part in parts:
                tables[name].update(*part)
    return pd.concat([_points(name, table, data, config) for name, table in tables.items()], ignore_index=True)


def _check_installed(config: Config) -> None:
    """Say before the pass over the images that PaCMAP is missing."""
    from importlib.util import find_spec

    if "pacmap" in config.methods and find_spec("pacmap") is None:
        raise MissingExtra("pacmap", "viz")


def _points(name: str, table: StateTable, data: Samples, config: Config) -> pd.DataFrame:
    """Rows of one model, from the CLS tokens of all images."""
    import numpy as np
    import pandas as pd

    index, labels, states = table.compute()
    (images, steps, _), k = states.shape, config.neighbours
    if (images - 1) * steps < max(k, 8):  # 8: the fewest that PaCMAP takes
        raise UserError(f"{k} neighbours and 2-D need more points than {images} images at {steps} steps: raise limit")
    points = states.reshape(images * steps, -1)
    of_image, step = np.divmod(np.arange(len(points)), steps)
    keys = {
        "model": name, "step": step + 1, "image": np.array([data.name(int(i)) for i in index], object)[of_image],
        "label": np.array(list(data.classes), object)[labels][of_image],
    }  # fmt: skip
    fixed = {
        "kept_null": k / (len(points) - 1),
        "staged_null": (abs(np.arange(steps)[:, None] - np.arange(steps)) <= 1).mean(1)[step],
        "same_class_null": ((np.bincount(labels)[labels] - 1) / (images - 1))[of_image], "neighbours": k, "n": images,
    }  # fmt: skip
    near, near_others = _neighbours(points, k, steps)
    frames = []
    for method in config.methods:
        flat = _pacmap(points, config.seed) if method == "pacmap" else _pca(points, config.seed)
        flat_near, flat_others = _neighbours(flat, k, steps)
        frames.append(pd.DataFrame(keys | fixed | {
            "method": method, "x": flat[:, 0].astype(float), "y": flat[:, 1].astype(float),
            "kept": (near[:, :, None] == flat_near[:, None, :]).any(2).mean(1),
            "staged": _share_within_one_step(flat_others, step),
            "staged_cls": _share_within_one_step(near_others, step),
            "same_class": _share_of_class(flat_others, labels[of_image]),
            "same_class_cls": _share_of_class(near_others, labels[of_image]),
        }))  # fmt: skip
    return pd.concat(frames)[list(COLUMNS)]


def _pacmap(points: np.ndarray, seed: int) -> np.ndarray:
    """PaCMAP in 2-D ``(n, 2)`` with the package's defaults: the same for the same points and seed.

    Its log is silenced, as it warns of every seed; and it leaves faiss on one thread, which is put back.
    """
    import logging

    import faiss
    import numpy as np
    import pacmap

    log, threads = logging.getLogger("pacmap.pacmap"), faiss.omp_get_max_threads()
    silent, log.disabled = log.disabled, True
    try:
        flat = pacmap.PaCMAP(n_components=2, random_state=seed).fit_transform(points)
    finally:
        log.disabled = silent
        faiss.omp_set_num_threads(threads)
    if not np.isfinite(flat).all():
        raise UserError("PaCMAP gave no finite coordinates: are all CLS tokens alike?")
    return flat


def _pca(points: np.ndarray, seed: int) -> np.ndarray:
    """The first two principal components ``(n, 2)``."""
    from sklearn.decomposition import PCA

    return PCA(2, random_state=seed).fit_transform(points)


def _neighbours(points: np.ndarray, k: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest points of each, and the k nearest that are of another image, ``(n, k)``; exact, Euclidean.

    Points are ordered image by image, `steps` each.
    """
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    most = min(k + steps - 1, len(points) - 1)  # its own image has steps - 1 others
    near = NearestNeighbors(n_neighbors=most).fit(points).kneighbors(return_distance=False)
    own = near // steps == (np.arange(len(points)) // steps)[:, None]
    others = np.take_along_axis(near, np.argsort(own, axis=1, kind="stable")[:, :k], axis=1)
    return near[:, :k], others


def _share_within_one_step(near: np.ndarray, step: np.ndarray) -> np.ndarray:
    return (abs(step[near] - step[:, None]) <= 1).mean(1)


def _share_of_class(near: np.ndarray, label: np.ndarray) -> np.ndarray:
    return (label[near] == label[:, None]).mean(1)


def plot(frame: pd.DataFrame) -> Figure:
    """Fig. 9: one panel a class, colour the step, the class's mean path with its first and last step.

    Of at most ten classes, the most frequent; three models, the first; PaCMAP's points where the table has them.
    """
    import textwrap

    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap

    from bvit_interp import plotting

    method = next(each for each in _METHODS if (frame["method"] == each).any())
    frame = frame[frame["method"] == method]
    models = list(dict.fromkeys(frame["model"]))[:_MOST_MODELS]
    frequent = frame.groupby("label", sort=False).size().sort_values(ascending=False, kind="stable")
    classes = sorted(frequent.index[:_MOST_CLASSES], key=str)
    columns = min(len(classes), 5)
    rows = -(-len(classes) // columns)
    figure, axes = plotting.canvas(columns, rows * len(models), width=2.3, height=2.3)
    last = int(frame["step"].max())
    # up to 0.92: the palette's end is too light on white
    shades = LinearSegmentedColormap.from_list(
        "steps", plotting.colormaps[plotting.SEQUENTIAL]([i / 99 * 0.92 for i in range(100)])
    )
    norm = BoundaryNorm([t + 0.5 for t in range(last + 1)], shades.N)
    for m, name in enumerate(models):
        of_model = frame[frame["model"] == name]
        for ax, label in zip(axes[m * rows : (m + 1) * rows].flat, classes, strict=False):
            _panel(ax, of_model, of_model[of_model["label"] == label], shades, norm)
            ax.set_title(str(label), fontsize=9)
        for ax in list(axes[m * rows : (m + 1) * rows].flat)[len(classes) :]:
            ax.set_axis_off()
        if len(models) > 1:
            axes[m * rows, 0].set_ylabel(name[-plotting.LONGEST_LABEL :], fontsize=9)
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=axes, label="step", aspect=30, shrink=0.8)
    bar.set_ticks([t for t in range(1, last + 1) if last <= 12 or t % 6 == 0 or t == 1])
    bar.ax.minorticks_off()
    lines = [textwrap.fill(_caption(frame, name, method), 38 * columns) for name in models]
    figure.suptitle("\n".join(lines), fontsize=8)
    return figure


def _panel(ax: Axes, everything: pd.DataFrame, of_class: pd.DataFrame, shades: Any, norm: Any) -> None:
    """One class over the grey of all points, and its mean path."""
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[])
    ax.scatter(everything["x"], everything["y"], s=3, color="0.9", linewidths=0)
    ax.scatter(of_class["x"], of_class["y"], s=7, c=of_class["step"], cmap=shades, norm=norm, linewidths=0)
    path = of_class.groupby("step")[["x", "y"]].mean()
    ax.plot(path["x"], path["y"], color="white", linewidth=3.5)
    ax.plot(path["x"], path["y"], color="black", linewidth=1.3, marker="o", markersize=2)
    for step in (path.index.min(), path.index.max()):
        ax.annotate(
            str(step), path.loc[step, ["x", "y"]], xytext=(4, 4), textcoords="offset points", fontsize=8, weight="bold",
            bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.8},
        )  # fmt: skip
    ax.set_aspect("equal", adjustable="datalim")


def _caption(frame: pd.DataFrame, name: str, method: str) -> str:
    """The checks in one line."""
    mean = frame[frame["model"] == name].mean(numeric_only=True)
    title = {"pacmap": "PaCMAP", "pca": "PCA"}[method]
    return (
        f"{name}, {title}: {mean['kept']:.2f} of the neighbours kept (chance {mean['kept_null']:.3f}); within one step"
        f" {mean['staged']:.2f} (CLS space {mean['staged_cls']:.2f}, null {mean['staged_null']:.2f}); own class"
        f" {mean['same_class']:.2f} (CLS space {mean['same_class_cls']:.2f}, null {mean['same_class_null']:.2f})"
    )
