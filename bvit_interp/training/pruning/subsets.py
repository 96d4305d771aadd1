"""Subsets of a data set by class, cluster or column."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import HDBSCAN, KMeans

from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.errors import DataError, UserError, choices
from bvit_interp.models import checkpoint

_log = logging.getLogger(__name__)
SPLITS = ("train", "test")
COLUMNS = {
    "split": "train, or test for the images that are scored",
    "index": "position of the image in the split, from 0",
    "label": "class of the image",
    "subset": "class, cluster or environment that the image belongs to",
}


class Pool:
    """The images of a split that are used.

    Parameters
    ----------
    samples : the split.
    classes : classes that are used; a label is a position in them.
    limit : number of images, evenly spaced over the split, before those of other classes are left
        out; None for all.

    Attributes
    ----------
    index : positions of the images in the split, ``(n,)`` int64.
    labels : ``(n,)`` int64.
    """

    def __init__(self, samples: Samples, classes: Sequence[str], limit: int | None) -> None:
        self.samples, self.classes = samples, tuple(classes)
        if unknown := [name for name in self.classes if name not in samples.classes]:
            raise UserError(f"no class {choices(unknown)}; classes: {choices(samples.classes)}")
        self._cache: dict[int, np.ndarray] = {}
        index = np.array(evenly_spaced(len(samples), limit), dtype=np.int64)
        position = np.array(
            [self.classes.index(c) if c in self.classes else -1 for c in samples.classes]
        )
        labels = position[np.array([self._label(i) for i in index.tolist()], dtype=np.int64)]
        self.index, self.labels = index[labels >= 0], labels[labels >= 0]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> np.ndarray:
        """Image i of those that are used, ``(H, W, 3)`` uint8."""
        position = int(self.index[i])
        cached = self._cache.get(position)
        return self.samples.read(position)[0] if cached is None else cached

    def _label(self, i: int) -> int:
        """Label of image i of the split.

        An image is decoded only where the set does not list labels; a small one is then kept.
        """
        if (labels := getattr(self.samples, "labels", None)) is not None:
            return int(labels[i])
        if (files := getattr(self.samples, "files", None)) is not None:
            return int(files[i][0])
        image, label, _ = self.samples.read(i)
        if self.samples.native_size is not None:
            self._cache[i] = image
        return label


@dataclass(frozen=True)
class Part:
    """A subset of the training images and what its subnetwork learns.

    Parameters
    ----------
    name : name of the class, cluster or environment.
    own : positions of its images in the pool.
    others : negative examples of a class; empty for a subset on which all classes are classified.
    output : the class of a one-vs-rest subset, or None.
    """

    name: str
    own: np.ndarray
    others: np.ndarray
    output: int | None = None


@dataclass(frozen=True)
class Partition:
    """All parts, and the part of each image ``(n,)``.

    It is -1 for test images if the parts are classes: every part then predicts for every image.
    """

    parts: tuple[Part, ...]
    of_train: np.ndarray
    of_test: np.ndarray


def whole(train: Pool) -> Part:
    """All images as one part, on which all classes are classified."""
    return Part("all", np.arange(len(train)), np.arange(0))


def by_class(train: Pool, test: Pool) -> Partition:
    """A part per class, one-vs-rest."""
    parts = []
    for k, name in enumerate(train.classes):
        own = train.labels == k
        for pool, kind in ((train, "training"), (test, "test")):
            if not (pool.labels == k).any():
                raise DataError(
                    f"class {name} has no {kind} image among the {len(pool)} that take part"
                )
        parts.append(Part(name, own.nonzero()[0], (~own).nonzero()[0], k))
    return Partition(_several(parts), train.labels, np.full(len(test), -1))


def by_column(train: Pool, test: Pool, source: str) -> Partition:
    """A part for every value of ``FILE.csv:COLUMN``.

    The file has the columns `split`, `index` and COLUMN, and a row per image.
    """
    file, colon, column = source.rpartition(":")
    if not colon or not Path(file).is_file():
        raise UserError(f"--column needs FILE.csv:COLUMN of a file that is there, got {source!r}")
    try:
        frame = pd.read_csv(file, dtype={column: str})
    except ValueError as error:
        raise UserError(f"{file}: not a table ({' '.join(str(error).split())})") from error
    for wanted in ("split", "index", column):
        if wanted not in frame:
            raise UserError(f"{file} has no column {wanted!r}; columns: {choices(frame.columns)}")
    frame = frame.dropna(subset=[column])
    found = []
    for split, pool in zip(SPLITS, (train, test), strict=True):
        own = frame[frame["split"] == split]
        if own["index"].duplicated().any():
            raise UserError(
                f"{file} has several rows for {split} image"
                f" {own['index'][own['index'].duplicated()].iloc[0]}"
            )
        values = own.set_index("index")[column].reindex(pool.index)
        if values.isna().any():
            raise UserError(
                f"{file}: no {column} for {int(values.isna().sum())} of the {len(pool)} {split}"
                f" images, for example index {values.index[values.isna()][0]}"
            )
        found.append(values.to_numpy(str))
    of_train, of_test = found
    return _by_value(of_train, of_test, sorted({*of_train, *of_test}))


def by_cluster(
    train: Pool, test: Pool, features: str, algorithm: str, clusters: int, seed: int, device: str
) -> Partition:
    """A part for every cluster of a model's features.

    Test images, and images that HDBSCAN calls noise, belong to the cluster of the nearest centre.

    Parameters
    ----------
    train, test : images.
    features : checkpoint, as `models.checkpoint.load` takes it. The features are its normalised CLS
        token after the last step.
    algorithm : kmeans or hdbscan (Campello et al. 2013).
    clusters : number of clusters for kmeans. HDBSCAN finds the number; each of its clusters has at
        least n / (2 `clusters`) of the n images.
    seed : random seed of kmeans.
    device : device of the model.
    """
    train_features, test_features = (_features(pool, features, device) for pool in (train, test))
    if clusters < 2 or clusters > len(train):
        raise UserError(f"clusters must be in 2..{len(train)}, the training images, got {clusters}")
    if algorithm == "kmeans":
        centres = (
            KMeans(clusters, n_init=10, random_state=seed).fit(train_features).cluster_centers_
        )
    else:
        least = max(len(train) // (2 * clusters), 2)
        centres = (
            HDBSCAN(min_cluster_size=least, store_centers="centroid", copy=True)
            .fit(train_features)
            .centroids_
        )
        _log.info("HDBSCAN found %d clusters of at least %d images", len(centres), least)
        if not len(centres):
            raise UserError(
                f"HDBSCAN found no cluster of {least} images: more --clusters, or --algorithm"
                " kmeans"
            )
    of_train, of_test = (
        np.square(x[:, None] - centres).sum(-1).argmin(1).astype(str)
        for x in (train_features, test_features)
    )
    return _by_value(of_train, of_test, [str(k) for k in range(len(centres))])


def membership(partition: Partition, train: Pool, test: Pool) -> pd.DataFrame:
    """The part of each image, one row of `COLUMNS` per image; `by_column` reads it back."""
    names = [part.name for part in partition.parts]
    rows = []
    for split, pool, parts in (
        (SPLITS[0], train, partition.of_train),
        (SPLITS[1], test, partition.of_test),
    ):
        subset = np.where(parts < 0, pool.labels, parts)
        labels = [pool.classes[label] for label in pool.labels]
        rows.append(
            pd.DataFrame(
                {
                    "split": split,
                    "index": pool.index,
                    "label": labels,
                    "subset": [names[k] for k in subset],
                }
            )
        )
    return pd.concat(rows, ignore_index=True)[list(COLUMNS)]


def _by_value(train: np.ndarray, test: np.ndarray, names: list[str]) -> Partition:
    parts = []
    for name in names:
        own = (train == name).nonzero()[0]
        if len(own) < 2:
            raise DataError(
                f"subset {name} has {len(own) or 'no'} training image{'s' * (not len(own))}:"
                " nothing to learn from"
            )
        if not (test == name).any():
            raise DataError(f"subset {name} has no test image")
        parts.append(Part(name, own, np.arange(0)))
    position = {name: k for k, name in enumerate(names)}
    of_train, of_test = (np.array([position[v] for v in values]) for values in (train, test))
    return Partition(_several(parts), of_train, of_test)


def _several(parts: list[Part]) -> tuple[Part, ...]:
    if len(parts) < 2:
        raise UserError(f"there is one subset only ({parts[0].name}): nothing to route between")
    return tuple(parts)


def _features(pool: Pool, spec: str, device: str) -> np.ndarray:
    """CLS tokens, or means of the patch tokens, of the images: ``(n, D)`` float64."""
    model = checkpoint.load_vit(spec, device)
    view: Callable[[np.ndarray], tuple[torch.Tensor, object]] = Geometry.of(model, pool.samples)
    found = []
    with torch.inference_mode():
        for begin in range(0, len(pool), 64):
            images = torch.stack(
                [view(pool.read(i))[0] for i in range(begin, min(begin + 64, len(pool)))]
            )
            tokens = model.forward_features(images.to(device))
            found.append((tokens[:, 0] if model.has_class_token else tokens.mean(1)).double().cpu())
    return torch.cat(found).numpy()
