"""The one pass over the images.

Each model gets every batch in its own geometry, on its own device, with labels in its own classes.

An analysis gives a function of a batch, and uses its results in a loop:

    def record(batch: ModelBatch) -> Tensor:
        return probes[batch.model].record(batch.images, "resid_post", tokens="cls")["resid_post"]

    for name, states in stream(models, data, config, record, progress="energy-rank"):
        grams[name].update(states)

The images are decoded once for all models. Under torchrun each process gets its own share of them.
The function must not change any state: if GPU memory is too small, it is called again on halves of
the batch. So the loop, not the function, adds results to statistics. A function that takes long
says with `ModelBatch.advance` how far it is, so that the progress bar moves within a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from bvit_interp.data.adapters import as_samples
from bvit_interp.data.files import say
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.labels import label_map
from bvit_interp.data.loader import Batch, Loader
from bvit_interp.data.options import LoaderOptions
from bvit_interp.data.partners import Partners
from bvit_interp.data.samples import Samples
from bvit_interp.errors import UserError
from bvit_interp.models.looped import Model
from bvit_interp.models.stepping import device_of
from bvit_interp.results import rank_and_world

Result = TypeVar("Result")
Options = TypeVar("Options", bound=LoaderOptions)


def _nothing(share: float) -> None:
    """Outside a pass there is no progress bar."""


@dataclass(frozen=True, kw_only=True)
class ModelBatch:
    """B images, prepared for one model."""

    model: str
    """Name of the model."""
    index: Tensor
    """Positions in the data set, ``(B,)`` int64, on the CPU."""
    names: tuple[str, ...]
    """Names of the images."""
    geometry: Geometry
    """How the images were resized and cropped to the model's size."""
    images: Tensor
    """``(B, 3, H, W)`` float, normalised, on the model's device."""
    masks: Tensor | None
    """``(B, H, W)`` int64 on the model's device: 0 background, label + 1 object, 1000 ignored. None
    if the data set has no masks."""
    data_labels: Tensor
    """Labels in the data set's classes, ``(B,)`` int64, on the model's device."""
    model_labels: Tensor | None = None
    """Labels in the model's classes; see `labels`."""
    partner: tuple[Tensor, Tensor] | None = None
    """Another image for each image, and the label of it; see `partner_images`."""
    advance: Callable[[float], None] = _nothing
    """Moves the progress bar: call it with the share of the work on this batch that is done,
    0..1."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.images.device

    @property
    def labels(self) -> Tensor:
        """Labels in the model's classes, ``(B,)`` int64; needs ``stream(labels=True)``."""
        if self.model_labels is None:
            raise ValueError("this pass has no labels: use stream(..., labels=True)")
        return self.model_labels

    @property
    def partner_images(self) -> Tensor:
        """Another image for each image, ``(B, 3, H, W)``; needs ``stream(partners=...)``."""
        return self._partner()[0]

    @property
    def partner_labels(self) -> Tensor:
        """Labels of `partner_images`, ``(B,)``; with ``labels=True`` in the model's classes."""
        return self._partner()[1]

    def _partner(self) -> tuple[Tensor, Tensor]:
        if self.partner is None:
            raise ValueError("this pass has no partners: use stream(..., partners=...)")
        return self.partner

    def take(self, rows: Tensor | slice) -> ModelBatch:
        """The batch of these rows: a slice, or int64 ``(b,)`` or bool ``(B,)`` on the CPU."""
        chosen = torch.arange(len(self))[rows]

        def of(tensor: Tensor) -> Tensor:
            return tensor[rows] if isinstance(rows, slice) else tensor[chosen.to(tensor.device)]

        return replace(
            self,
            index=of(self.index),
            names=tuple(self.names[i] for i in chosen.tolist()),
            images=of(self.images),
            masks=None if self.masks is None else of(self.masks),
            data_labels=of(self.data_labels),
            model_labels=None if self.model_labels is None else of(self.model_labels),
            partner=None if self.partner is None else (of(self.partner[0]), of(self.partner[1])),
        )


def stream(
    models: Mapping[str, Model],
    data: Samples | Any,
    options: LoaderOptions,
    compute: Callable[[ModelBatch], Result],
    *,
    progress: str,
    labels: bool = False,
    partners: Partners | None = None,
    images_at_once: Mapping[str, int] | None = None,
    grad: bool = False,
) -> Iterator[tuple[str, Result]]:
    """Yield (name of the model, result of `compute`) for every batch and model.

    Parameters
    ----------
    models : name -> model.
    data : the data set, `Samples` or what `as_samples` takes.
    options : which images, how many per batch, and how they are read.
    compute : called with each model's batch, under ``torch.inference_mode`` unless `grad`.
    progress : text of the progress bar.
    labels : translate labels to each model's classes.
    partners : add the partner of each image to the batch.
    images_at_once : name -> most images per call of `compute`; larger batches are halved first.
    grad : compute gradients.

    Raises
    ------
    DataError
        If `labels` is set and the classes do not match a model's, or if an image cannot be read.
    UserError
        If a single image does not fit in GPU memory.
    """
    data = as_samples(data)
    views = {
        name: _View(
            name,
            device_of(model),
            Geometry.of(model, data, options.resize),
            label_map(data, model, options.classes) if labels else None,
        )
        for name, model in models.items()
    }
    loader = Loader(
        data,
        [view.geometry for view in views.values()],
        options.batch_size,
        limit=options.limit,
        workers=options.workers,
        skip_corrupt=options.skip_corrupt,
    )
    done = 0  # images, counted once per model

    def show(share: float, images: int) -> None:
        skipped = len(loader.skipped)
        bar.n = round(done + share * images + len(views) * skipped, 1)
        if skipped:
            bar.set_postfix(skipped=skipped, refresh=False)
        bar.update(0)

    def run(batch: ModelBatch) -> Result:
        with torch.inference_mode(not grad):
            return compute(replace(batch, advance=lambda share: show(share, len(batch))))

    total, silent = len(views) * len(loader.index), rank_and_world()[0] > 0
    with tqdm(total=total, desc=progress, unit="image", disable=silent) as bar:
        for batch in loader:
            others = {}
            if partners is not None:  # read once per geometry, like the images
                others = {geometry: partners(batch.index, geometry) for geometry in batch.views}
            for name, view in views.items():
                own = view.of(batch, others.get(view.geometry))
                for part in _parts(own, (images_at_once or {}).get(name)):
                    for result in halve_on_oom(run, part):
                        yield name, result
                    done += len(part)
                    show(0, 0)
        show(0, 0)


def at_most(options: Options, data: Samples | Any, images: int, costly: str) -> Options:
    """The options, limited to a number of images where they have no limit of their own.

    Parameters
    ----------
    images : the most images of a costly measure, where the user does not ask for more.
    costly : what costs much, with which a line on stderr says that the images are limited.
    """
    there = len(as_samples(data))
    if options.limit is not None or there <= images:
        return options
    if rank_and_world()[0] == 0:
        say(f"{costly}: {images} of {there} images are used; for all of them, --limit {there}")
    return replace(options, limit=images)


@dataclass(frozen=True)
class _View:
    """Device, geometry and classes of one model."""

    name: str
    device: torch.device
    geometry: Geometry
    classes: Tensor | None

    def of(self, batch: Batch, others: tuple[Tensor, Tensor] | None) -> ModelBatch:
        images, masks = batch.views[self.geometry]
        partner = None
        if others is not None:
            pictures, labels = others
            known = labels if self.classes is None else self.classes[labels]
            partner = (pictures.to(self.device), known.to(self.device))
        return ModelBatch(
            model=self.name,
            index=batch.index,
            names=tuple(batch.names),
            geometry=self.geometry,
            images=images.to(self.device),
            masks=None if masks is None else masks.to(self.device),
            data_labels=batch.labels.to(self.device),
            model_labels=(
                None if self.classes is None else self.classes[batch.labels].to(self.device)
            ),
            partner=partner,
        )


def _parts(batch: ModelBatch, at_once: int | None) -> Iterator[ModelBatch]:
    """The batch, halved until each part has at most `at_once` images, but at least one."""
    if at_once is None or len(batch) <= max(at_once, 1):
        yield batch
    else:
        for half in _halves(batch):
            yield from _parts(half, at_once)


def _halves(batch: ModelBatch) -> tuple[ModelBatch, ModelBatch]:
    middle = len(batch) // 2
    return batch.take(slice(middle)), batch.take(slice(middle, None))


def halve_on_oom(compute: Callable[[ModelBatch], Result], batch: ModelBatch) -> list[Result]:
    """Results of `compute` on the batch or, if GPU memory is too small, on its halves.

    Raises
    ------
    UserError
        If a single image does not fit.
    """
    try:
        return [compute(batch)]
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise UserError(
                f"out of GPU memory with a single image ({batch.names[0]}): use a smaller model or"
                " --device cpu"
            ) from None
    # outside the handler, because the exception keeps the tensors of the failed run
    torch.cuda.empty_cache()
    return [result for half in _halves(batch) for result in halve_on_oom(compute, half)]
