"""Points in two dimensions, by PaCMAP or PCA."""

from __future__ import annotations

import logging

import numpy as np
from jaxtyping import Float
from sklearn.decomposition import PCA

from bvit_interp.errors import UserError


def pacmap_embedding(
    points: Float[np.ndarray, "points width"], seed: int
) -> Float[np.ndarray, "points 2"]:
    """PaCMAP (Wang et al., 2021) with the package's defaults; equal for equal points and seed.

    Its log is silenced, because it warns about every seed. The number of OpenMP threads stays as it
    was, also torch's: importing pacmap would set it to all cores, and an embedding to one.

    Raises
    ------
    UserError
        If all points are equal, or a coordinate is not finite.
    """
    import faiss  # belongs to an extra, like pacmap

    if (points == points[0]).all():
        raise UserError("PaCMAP cannot embed points that are all equal")
    log, threads = logging.getLogger("pacmap.pacmap"), faiss.omp_get_max_threads()
    was_disabled, log.disabled = log.disabled, True
    try:
        import pacmap

        embedded = pacmap.PaCMAP(n_components=2, random_state=seed).fit_transform(points)
    finally:
        log.disabled = was_disabled
        faiss.omp_set_num_threads(threads)
    if not np.isfinite(embedded).all():
        raise UserError("PaCMAP gave coordinates that are not finite")
    return embedded


def pca_embedding(
    points: Float[np.ndarray, "points width"], seed: int
) -> Float[np.ndarray, "points 2"]:
    """The first two principal components."""
    return PCA(2, random_state=seed).fit_transform(points)
