"""Batches of a data set, decoded once for all models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Samples, evenly_spaced
from bvit_interp.errors import DataError, UserError, choices
from bvit_interp.results import rank_and_world

_log = logging.getLogger(__name__)
View = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Batch:
    """B images, seen in every geometry.

    Parameters
    ----------
    index : positions in the data set, ``(B,)`` int64.
    labels : indices into its classes, ``(B,)`` int64.
    views : for each geometry, images ``(B, 3, H, W)`` float and masks ``(B, H, W)`` int64 or None.
    names : names of the images.
    """

    index: torch.Tensor
    labels: torch.Tensor
    views: dict[Geometry, View]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def images(self) -> torch.Tensor:
        """The images of the only geometry."""
        return self._only_view()[0]

    @property
    def masks(self) -> torch.Tensor | None:
        """The masks of the only geometry."""
        return self._only_view()[1]

    def _only_view(self) -> View:
        if len(self.views) != 1:
            raise ValueError(f"the batch has {len(self.views)} geometries: use one of its views")
        return next(iter(self.views.values()))


class Loader:
    """This process's share of a data set, in batches.

    Parameters
    ----------
    samples : the data set.
    geometries : one or more; equal geometries share a view.
    batch_size : images per batch and process.
    limit : number of images, evenly spaced over the set; by default all.
    workers : processes that decode images; 0 decodes in this process.
    skip_corrupt : leave out images that cannot be read and list them in `skipped`, instead of
        raising an error.

    Attributes
    ----------
    index : positions in the data set of this process's share.
    skipped : names of the images that this process left out in the last pass.

    Raises
    ------
    UserError
        If the limit or the batch size is below 1.
    DataError
        If the set is empty. While iterating: if an image cannot be read, or none can.
    """

    def __init__(
        self,
        samples: Samples,
        geometries: Iterable[Geometry],
        batch_size: int,
        *,
        limit: int | None = None,
        workers: int = 0,
        skip_corrupt: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size must be at least 1, got {batch_size}")
        if not len(samples):
            raise DataError("the data set has no images")
        rank, world = rank_and_world()
        self.index = evenly_spaced(len(samples), limit)[rank::world]
        self.skip_corrupt, self.skipped = skip_corrupt, list[str]()
        self._batches = DataLoader(
            _Views(samples, self.index, tuple(dict.fromkeys(geometries))),
            batch_size,
            num_workers=workers,
            collate_fn=_collate,
        )

    def __len__(self) -> int:
        """Largest possible number of batches; a batch whose images are all skipped is left out."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        total = len(self.index)
        for batch, unreadable in self._batches:
            if unreadable and not self.skip_corrupt:
                raise DataError(unreadable[0].reason)
            self.skipped += [image.name for image in unreadable]
            if batch is not None:
                yield batch
        if self.skipped:
            _log.warning(
                "left out %d images that cannot be read: %s",
                len(self.skipped),
                choices(self.skipped),
            )
        if total and len(self.skipped) == total:
            raise DataError(f"none of the {total} images can be read, e.g. {self.skipped[0]}")


@dataclass(frozen=True)
class _Image:
    index: int
    name: str
    label: int
    views: dict[Geometry, View]


@dataclass(frozen=True)
class _Unreadable:
    """Sent by a worker instead of its DataError, which torch would wrap in a traceback."""

    name: str
    reason: str


class _Views(Dataset[_Image | _Unreadable]):
    def __init__(
        self, samples: Samples, index: list[int], geometries: tuple[Geometry, ...]
    ) -> None:
        self.samples, self.index, self.geometries = samples, index, geometries

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> _Image | _Unreadable:
        i = self.index[position]
        try:
            image, label, mask = self.samples.read(i)
        except DataError as error:
            return _Unreadable(self.samples.name(i), str(error))
        views = {geometry: geometry(image, mask) for geometry in self.geometries}
        return _Image(i, self.samples.name(i), label, views)


def _collate(items: Sequence[_Image | _Unreadable]) -> tuple[Batch | None, list[_Unreadable]]:
    images = [item for item in items if isinstance(item, _Image)]
    unreadable = [item for item in items if isinstance(item, _Unreadable)]
    if not images:
        return None, unreadable
    views = {
        geometry: _stacked([image.views[geometry] for image in images])
        for geometry in images[0].views
    }
    index = torch.tensor([image.index for image in images])
    labels = torch.tensor([image.label for image in images])
    return Batch(index, labels, views, [image.name for image in images]), unreadable


def _stacked(views: list[View]) -> View:
    masks = [mask for _, mask in views if mask is not None]
    return torch.stack([image for image, _ in views]), torch.stack(masks) if masks else None
