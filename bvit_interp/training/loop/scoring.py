"""The images a run is scored on, as its model sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch

from bvit_interp import results
from bvit_interp.data.catalog import open_samples
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Loader
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.models.bvit import BViT
from bvit_interp.training.loop import feed
from bvit_interp.training.loop.recipe import Recipe

_KEPT_BYTES = 4 * 2**30  # test images kept as the model sees them


class Test:
    """The test images as a model sees them; kept on the device where they fit.

    Parameters
    ----------
    samples : the data set.
    geometry : how the model sees it.
    places : the model's class of each class of the set, ``(classes,)``.
    workers, device : how and where the images are read.
    """

    def __init__(
        self, samples: Samples, geometry: Geometry, places: torch.Tensor, workers: int, device: str
    ) -> None:
        self.places, self.device = places, device
        self.loader = Loader(samples, [geometry], batch_size=250, workers=workers)
        self.fits = 12 * len(self.loader.index) * math.prod(geometry.size) <= _KEPT_BYTES
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(self) -> None:
        """Read the images now, where they are kept."""
        if not self.kept:
            with torch.inference_mode():
                for _ in self:
                    pass

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images ``(b, 3, H, W)`` and the model's labels ``(b,)``, of this process's share."""
        if self.kept:
            yield from self.kept
            return
        kept = []
        for batch in self.loader:
            pair = batch.images.to(self.device), self.places[batch.labels].to(self.device)
            if self.fits:
                kept.append(pair)
            yield pair
        self.kept = kept


_TESTS: WeakValueDictionary[tuple, Test] = WeakValueDictionary()  # runs side by side share one


def test_images(trained: Samples, model: BViT, recipe: Recipe, device: str) -> Test:
    """The recipe's test images.

    Raises
    ------
    UserError
        If they are the images it is trained on, or of other classes.
    """
    samples = open_samples(recipe.data)
    place, own = (
        [getattr(kind, name, None) for name in ("root", "split")] for kind in (samples, trained)
    )
    if place == own:
        raise UserError(f"recipe: {recipe.data} has nothing to score on beside its training images")
    places, geometry = label_map(samples, model), Geometry.of(model, samples)
    key = (
        feed.fingerprint(samples),
        geometry,
        tuple(places.tolist()),
        device,
        results.rank_and_world(),
    )
    if (found := _TESTS.get(key)) is None:
        found = _TESTS[key] = Test(samples, geometry, places, feed.readers(recipe, device), device)
    return found
