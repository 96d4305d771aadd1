"""The test images of a run, and its models' scores on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from weakref import WeakValueDictionary

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bvit_interp.data.catalog import open_samples
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Loader
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.metrics.streaming.scores import Classification
from bvit_interp.models.bvit import BViT
from bvit_interp.results import rank_and_world
from bvit_interp.training.loop.preload import fingerprint, reader_processes
from bvit_interp.training.loop.recipe import Recipe

_BATCH = 250
_KEPT_BYTES = 4 * 2**30  # largest size of the test images that are kept
_PIXEL_BYTES = 12  # three channels of float32


class ScoringImages:
    """The test images as a model sees them, kept on the device if they fit.

    It reads through `Loader` rather than `stream`, because the images are kept between epochs and
    training has its own progress bar.

    Parameters
    ----------
    samples : the data set.
    geometry : how the model sees it.
    model_class : the model's class of each class of the data set, ``(classes,)``.
    workers : processes that read the images.
    device : device of the images.

    Attributes
    ----------
    fits : whether the images are kept.
    """

    def __init__(
        self,
        samples: Samples,
        geometry: Geometry,
        model_class: Tensor,
        workers: int,
        device: str,
    ) -> None:
        self.model_class, self.device = model_class, device
        self.loader = Loader(samples, [geometry], batch_size=_BATCH, workers=workers)
        size = _PIXEL_BYTES * len(self.loader.index) * math.prod(geometry.size)
        self.fits = size <= _KEPT_BYTES
        self.kept: list[tuple[Tensor, Tensor]] = []

    def read(self) -> None:
        """Read the images now, unless that was done before."""
        if not self.kept:
            with torch.inference_mode():
                for _ in self:
                    pass

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``(b, 3, H, W)`` and the model's labels ``(b,)`` of this process's share."""
        if self.kept:
            yield from self.kept
            return
        kept = []
        for batch in self.loader:
            labels = self.model_class[batch.labels]
            pair = batch.images.to(self.device), labels.to(self.device)
            if self.fits:
                kept.append(pair)
            yield pair
        self.kept = kept


# several runs in one process share the images
_SHARED: WeakValueDictionary[tuple, ScoringImages] = WeakValueDictionary()


def scoring_images(trained: Samples, model: BViT, recipe: Recipe, device: str) -> ScoringImages:
    """The recipe's test images.

    Raises
    ------
    UserError
        If they are the images that the model is trained on, or of other classes.
    """
    samples = open_samples(recipe.data)
    if _source(samples) == _source(trained):
        raise UserError(f"recipe: {recipe.data} has nothing to score on beside its training images")
    model_class, geometry = label_map(samples, model), Geometry.of(model, samples)
    key = (fingerprint(samples), geometry, tuple(model_class.tolist()), device, rank_and_world())
    if (shared := _SHARED.get(key)) is None:
        workers = reader_processes(recipe, device)
        shared = _SHARED[key] = ScoringImages(samples, geometry, model_class, workers, device)
    return shared


def score(models: Mapping[str, VisionTransformer], images: ScoringImages) -> dict[str, dict]:
    """Scores (`Classification`) of models in full precision, in one pass; name -> scores."""
    metrics = {
        name: Classification(model.num_classes).to(images.device) for name, model in models.items()
    }
    with torch.inference_mode():
        for pixels, labels in images:
            for name, model in models.items():
                metrics[name].update(model(pixels), labels)
    return {name: metric.compute() for name, metric in metrics.items()}


def _source(samples: Samples) -> list[object]:
    return [getattr(samples, name, None) for name in ("root", "split")]
