"""Data that Python already holds, as `Samples`: data sets, loaders, tensors.

    data = as_samples(torchvision.datasets.OxfordIIITPet(root))
    data = from_tensors(images, labels, classes=["cat", "dog"])
    frame = evaluate.measure(models, data, evaluate.Config())

The `measure` of every question calls `as_samples` itself, which is needed only to say more.
Each model resizes, crops and normalises images itself. So images are given before that: PIL
pictures, or arrays ``(3, H, W)`` or ``(1, H, W)``, uint8 or floats in 0..1. For normalised floats
the `mean` and `std` of their normalisation are given too, and undone. Arrays that are square and of
the model's size are not resized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate

from bvit_interp.data.catalog import open_samples
from bvit_interp.data.samples import Samples, picture_pixels, read_image
from bvit_interp.errors import DataError, UserError, choices, first_line

Channels = Sequence[float]
TAKEN = (
    "the name or folder of a data set, Samples, a data set of (image, label) as torchvision's, a"
    " Dataset of Hugging Face, a DataLoader, or a pair of tensors (images, labels)"
)


class Items:
    """Images and labels that a function gives by index, as `Samples`.

    Parameters
    ----------
    length : number of images.
    get : index -> (image, label): a PIL picture, an array or the bytes of a file, and an int.
    classes : class names.
    names : index -> name of the image.
    mean, std : of the normalisation to undo, per channel of an image in 0..1.
    masks : class ids ``(length, H, W)`` in the coding of `samples`, or None.

    Raises
    ------
    DataError
        If there are no images, or the first cannot be used; the message says what is missing.
    """

    def __init__(
        self,
        length: int,
        get: Callable[[int], tuple[Any, Any]],
        classes: Sequence[str],
        *,
        names: Callable[[int], str],
        mean: Channels | None = None,
        std: Channels | None = None,
        masks: np.ndarray | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise UserError("mean and std are given together, or neither")
        if not length:
            raise DataError("the data set has no images")
        self._length, self._get, self._names = length, get, names
        self._scale = None if mean is None or std is None else _scale(mean, std)
        self._masks = masks
        self.classes: tuple[str, ...] = tuple(map(str, classes))
        self.has_masks = masks is not None
        first = self._item(0)[0]
        height, width = self._pixels(first, 0).shape[:2]
        fixed = not isinstance(first, Image.Image | bytes | Path) and height == width
        self.native_size: int | None = height if fixed else None

    def __len__(self) -> int:
        return self._length

    def name(self, i: int) -> str:
        return self._names(i)

    def read(self, i: int) -> tuple[np.ndarray, int, np.ndarray | None]:
        image, given = self._item(i)
        label = _label(given, self.name(i))
        if not 0 <= label < len(self.classes):
            raise DataError(f"{self.name(i)}: label {label} of {len(self.classes)} classes")
        pixels = self._pixels(image, i)
        mask = None if self._masks is None else np.asarray(self._masks[i]).astype(np.int32)
        if mask is not None and mask.shape != pixels.shape[:2]:
            raise DataError(f"{self.name(i)}: mask {mask.shape} for an image {pixels.shape[:2]}")
        return pixels, label, mask

    def _item(self, i: int) -> tuple[Any, Any]:
        try:
            item = self._get(i)
        except UserError:
            raise
        except Exception as error:  # the code of somebody's data set
            why = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{self.name(i)}: cannot be read ({why})") from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(
                f"{self.name(i)}: an item is (image, label), this is {type(item).__name__}"
            )
        return item[0], item[1]

    def _pixels(self, image: Any, i: int) -> np.ndarray:
        """Pixels ``(H, W, 3)`` uint8."""
        name = self.name(i)
        if isinstance(image, bytes | Path):
            return read_image(image, name)
        if isinstance(image, Image.Image):
            return picture_pixels(image, name)
        array = image.detach().cpu() if isinstance(image, torch.Tensor) else image
        array = np.asarray(array.float() if getattr(array, "dtype", 0) == torch.bfloat16 else array)
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise DataError(
                f"{name}: an image is a PIL picture or an array (3, H, W) or (1, H, W), this is"
                f" {type(image).__name__} {tuple(getattr(image, 'shape', ()))}".rstrip(" ()")
            )
        if array.dtype != np.uint8:
            array = self._bytes(array, name)
        elif self._scale is not None:
            raise DataError(f"{name}: mean and std are of normalised floats, this is uint8")
        return np.array(np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0))

    def _bytes(self, array: np.ndarray, name: str) -> np.ndarray:
        if array.dtype.kind != "f":
            raise DataError(f"{name}: pixels are uint8 or floats in 0..1, these are {array.dtype}")
        values = array.astype(np.float64)
        if self._scale is not None:
            mean, std = self._scale
            values = values * std + mean
        # half a grey value beyond is rounding; NaN is beyond everything
        if not (values >= -0.002).all() or not (values <= 1.002).all():
            span = f"{values.min():.3g}..{values.max():.3g}"
            also = "wrong" if self._scale is not None else "missing"
            raise DataError(
                f"{name}: floats in {span}, not 0..1: give images before normalisation, or its"
                f" mean and std ({also}), as in as_samples(data, mean=..., std=...)"
            )
        return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def as_samples(
    data: Any,
    *,
    classes: Sequence[str] | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Samples:
    """Data of any kind that is known, as `Samples`.

    Parameters
    ----------
    data : the name or folder of a data set, `Samples`, a data set of (image, label) as
        torchvision's, a `Dataset` of Hugging Face, a `DataLoader`, or a pair of tensors.
    classes : class names, if the data has none.
    mean, std : of the normalisation to undo.

    Raises
    ------
    UserError
        If it is something else, or something is missing; the message says what to give.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, str | Path):
        return open_samples(str(data))
    if isinstance(data, DataLoader):
        return from_loader(data, classes=classes, mean=mean, std=std)
    if isinstance(data, tuple | list) and len(data) == 2 and hasattr(data[0], "shape"):
        return from_tensors(data[0], data[1], classes=classes, mean=mean, std=std)
    if hasattr(data, "column_names"):
        return from_huggingface(data, classes=classes)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, dict):
        return from_dataset(data, classes=classes, mean=mean, std=std)
    raise UserError(f"data is {TAKEN}; this is {type(data).__name__}")


def from_dataset(
    dataset: Any,
    *,
    classes: Sequence[str] | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Samples:
    """A data set of (image, label), such as those of torchvision and parts of them."""
    whole = dataset
    while classes is None and whole is not None:
        classes, whole = getattr(whole, "classes", None), getattr(whole, "dataset", None)
    kind = type(dataset).__name__
    if classes is None:
        raise UserError(f"{kind} has no attribute classes: give their names, classes=[...]")
    return Items(
        len(dataset),
        dataset.__getitem__,
        classes,
        names=lambda i: f"{kind}/{i:06d}",
        mean=mean,
        std=std,
    )


def from_huggingface(
    dataset: Any,
    *,
    image: str | None = None,
    label: str | None = None,
    classes: Sequence[str] | None = None,
) -> Samples:
    """One split of a `datasets.Dataset`.

    Parameters
    ----------
    dataset : the split, with columns of images and of integer labels.
    image, label : their columns; by default img or image, and label or fine_label.
    classes : class names, if the label's column is no `ClassLabel`.
    """
    if isinstance(dataset.column_names, dict):
        raise UserError(f"the data set has splits: give one, {choices(dataset.column_names)}")
    if not hasattr(dataset, "__len__"):
        raise UserError("the data set is streamed: load it without streaming=True")
    columns = [
        given or next((name for name in known if name in dataset.column_names), None)
        for given, known in ((image, ("img", "image")), (label, ("label", "fine_label")))
    ]
    for column, what in zip(columns, ("image", "label"), strict=True):
        if column is None or column not in dataset.column_names:
            raise UserError(
                f"the data set has no column {column or what}: say {what}=, one of"
                f" {choices(dataset.column_names)}"
            )
    pictures, labels = columns
    names = classes or getattr(dataset.features[labels], "names", None)
    if names is None:
        raise UserError(f"column {labels} names no classes: give their names, classes=[...]")

    def get(i: int) -> tuple[Any, Any]:
        row = dataset[i]
        picture = row[pictures]
        return picture.get("bytes") if isinstance(picture, dict) else picture, row[labels]

    return Items(len(dataset), get, names, names=lambda i: f"{pictures}/{i:06d}")


def from_loader(
    loader: DataLoader[Any],
    *,
    classes: Sequence[str] | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Samples:
    """The data set of a loader; what a `collate_fn` or an iterable makes is kept in memory."""
    dataset = loader.dataset
    if loader.collate_fn is default_collate and not isinstance(dataset, IterableDataset):
        return from_dataset(dataset, classes=classes, mean=mean, std=std)
    batches = list(loader)
    if bad := [batch for batch in batches if not isinstance(batch, tuple | list) or len(batch) < 2]:
        raise DataError(
            f"a batch of the loader is (images, labels), this is {type(bad[0]).__name__}"
        )
    if not batches:
        raise DataError("the loader gives no batches")
    images = torch.cat([torch.as_tensor(batch[0]).cpu() for batch in batches])
    labels = torch.cat([torch.as_tensor(batch[1]).cpu() for batch in batches])
    names = getattr(dataset, "classes", None) if classes is None else classes
    return from_tensors(images, labels, classes=names, mean=mean, std=std)


def from_tensors(
    images: Any,
    labels: Any,
    *,
    classes: Sequence[str] | None = None,
    masks: Any = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Samples:
    """Images ``(N, 3, H, W)`` and labels ``(N,)``, tensors or arrays.

    Parameters
    ----------
    classes : class names; by default the numbers up to the highest label.
    masks : class ids ``(N, H, W)``: 0 background, label + 1 object, 1000 ignored.
    mean, std : of the normalisation to undo.
    """
    if len(getattr(images, "shape", ())) != 4:
        raise DataError(f"images are (N, 3, H, W), got {tuple(getattr(images, 'shape', ()))}")
    numbers = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if numbers.shape != (len(images),) or numbers.dtype.kind not in "iu":
        raise DataError(
            f"labels are {len(images)} integers, got {tuple(numbers.shape)} of {numbers.dtype}"
        )
    names: Iterable[str] = (
        map(str, range(int(numbers.max(initial=-1)) + 1)) if classes is None else classes
    )
    return Items(
        len(images),
        lambda i: (images[i], numbers[i]),
        list(names),
        names=lambda i: f"image/{i:06d}",
        mean=mean,
        std=std,
        masks=None if masks is None else np.asarray(masks),
    )


def _scale(mean: Channels, std: Channels) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, ``(channels, 1, 1)`` each."""
    pair = [np.asarray(list(values), float).reshape(-1, 1, 1) for values in (mean, std)]
    if any(len(values) not in (1, 3) or not np.isfinite(values).all() for values in pair):
        raise UserError("mean and std are three finite numbers each, or one")
    return pair[0], pair[1]


def _label(given: Any, name: str) -> int:
    try:
        label = int(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: a label is one integer, this is {given!r:.60}") from error
    if label != given:
        raise DataError(f"{name}: a label is one integer, this is {given!r:.60}")
    return label
