"""Which way does the CLS token go from step to step, and do its images part by class or by step?

Fig. 9 and Appendix E.2 of bViT (arXiv 2605.10661): the CLS token after every step of many images,
brought to two dimensions by PaCMAP (Wang et al., 2021), one panel a class, the colour the step. As
the paper does not say how, one fit holds all images and steps of a model, with the package's
defaults; PCA stands beside it. What a picture of 2-D shows may be the picture's own, so every point
carries two checks, which are ours:

- `kept`: the share of its k nearest neighbours in CLS space that are also its k nearest in 2-D;
  chance is k / (n - 1);
- `staged`: the share of its k nearest neighbours among other images' points that are at most one
  step away, in 2-D and (`staged_cls`) in CLS space. Null: the steps of every other image permuted,
  which leaves the embedding as it is and gives 3 / T, or 2 / T at the first and last step. 2-D
  above CLS space is an artefact of the embedding. Staging is no sign of training: an untrained ViT
  has the most of it (0.99), as its images hardly differ;

`same_class` and `same_class_cls` are the same shares of the own class, with the share expected of
labels permuted over images; one sees at which step classes part.

Cost: one forward an image; n images x T x D float32 numbers are kept (0.37 GB for 10,000 images of
bViT-B). PaCMAP takes 3 s for 6000 points and 6.5 s for 12,000 on one core, neighbours grow with the
square (12,000: 8 s). All images of a large data set take hours: set `limit`. Expected: neighbouring
steps lie together and classes part over the steps, as in Fig. 9; the paper gives no number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec

import faiss
import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from timm.models.vision_transformer import VisionTransformer

from bvit_interp.analyses.trajectories import COLUMNS, Config
from bvit_interp.analyses.trajectories.states import StateTable
from bvit_interp.data.loader import run_in_halves
from bvit_interp.data.samples import Samples
from bvit_interp.errors import MissingExtra, UserError
from bvit_interp.models.unroll import run_on
from bvit_interp.probes.probe import Probe


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
    _check_installed(config)
    probes = {
        name: Probe(run_on(model, config.steps or len(model.blocks)))
        for name, model in models.items()
    }
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
                        part.index,
                        part.labels,
                        p.record(part.views[g][0].to(d), "resid_post", tokens="cls")["resid_post"],
                    ),
                    batch,
                )
            for part in parts:
                tables[name].update(*part)
    return pd.concat(
        [_points(name, table, data, config) for name, table in tables.items()], ignore_index=True
    )


def _check_installed(config: Config) -> None:
    """Say before the pass over the images that PaCMAP is missing."""
    if "pacmap" in config.methods and find_spec("pacmap") is None:
        raise MissingExtra("pacmap", "viz")


def _points(name: str, table: StateTable, data: Samples, config: Config) -> pd.DataFrame:
    """Rows of one model, from the CLS tokens of all images."""
    index, labels, states = table.compute()
    (images, steps, _), k = states.shape, config.neighbours
    if (images - 1) * steps < max(k, 8):  # 8: the fewest that PaCMAP takes
        raise UserError(
            f"{k} neighbours and 2-D need more points than {images} images at {steps} steps: raise limit"
        )
    points = states.reshape(images * steps, -1)
    of_image, step = np.divmod(np.arange(len(points)), steps)
    keys = {
        "model": name,
        "step": step + 1,
        "image": np.array([data.name(int(i)) for i in index], object)[of_image],
        "label": np.array(list(data.classes), object)[labels][of_image],
    }
    fixed = {
        "kept_null": k / (len(points) - 1),
        "staged_null": (abs(np.arange(steps)[:, None] - np.arange(steps)) <= 1).mean(1)[step],
        "same_class_null": ((np.bincount(labels)[labels] - 1) / (images - 1))[of_image],
        "neighbours": k,
        "n": images,
    }
    near, near_others = _neighbours(points, k, steps)
    frames = []
    for method in config.methods:
        flat = _pacmap(points, config.seed) if method == "pacmap" else _pca(points, config.seed)
        flat_near, flat_others = _neighbours(flat, k, steps)
        frames.append(
            pd.DataFrame(
                keys
                | fixed
                | {
                    "method": method,
                    "x": flat[:, 0].astype(float),
                    "y": flat[:, 1].astype(float),
                    "kept": (near[:, :, None] == flat_near[:, None, :]).any(2).mean(1),
                    "staged": _share_within_one_step(flat_others, step),
                    "staged_cls": _share_within_one_step(near_others, step),
                    "same_class": _share_of_class(flat_others, labels[of_image]),
                    "same_class_cls": _share_of_class(near_others, labels[of_image]),
                }
            )
        )
    return pd.concat(frames)[list(COLUMNS)]


def _pacmap(points: np.ndarray, seed: int) -> np.ndarray:
    """PaCMAP in 2-D ``(n, 2)`` with the package's defaults: the same for the same points and seed.

    Its log is silenced, as it warns of every seed; and it leaves faiss on one thread, which is put
    back.
    """
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
    return PCA(2, random_state=seed).fit_transform(points)


def _neighbours(points: np.ndarray, k: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest points of each, and the k nearest that are of another image, ``(n, k)``; exact,
    Euclidean.

    Points are ordered image by image, `steps` each.
    """
    most = min(k + steps - 1, len(points) - 1)  # its own image has steps - 1 others
    near = NearestNeighbors(n_neighbors=most).fit(points).kneighbors(return_distance=False)
    own = near // steps == (np.arange(len(points)) // steps)[:, None]
    others = np.take_along_axis(near, np.argsort(own, axis=1, kind="stable")[:, :k], axis=1)
    return near[:, :k], others


def _share_within_one_step(near: np.ndarray, step: np.ndarray) -> np.ndarray:
    return (abs(step[near] - step[:, None]) <= 1).mean(1)


def _share_of_class(near: np.ndarray, label: np.ndarray) -> np.ndarray:
    return (label[near] == label[:, None]).mean(1)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over images."""
    return (
        frame.groupby(list(frame)[: list(frame).index("image")], sort=False)
        .mean(numeric_only=True)
        .reset_index()
    )
