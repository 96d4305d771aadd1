"""Match a data set's classes to a model's."""

from __future__ import annotations

from collections import Counter

import torch
from timm.data import ImageNetInfo

from bvit_interp.data.samples import Samples
from bvit_interp.errors import DataError, choices
from bvit_interp.models.checkpoint import class_names
from bvit_interp.models.looped import Model


def label_map(samples: Samples, model: Model) -> torch.Tensor:
    """The model's class index of every class of the data set, ``(classes,)`` int64.

    By name where the model's checkpoint names all of them; else class i is class i if there are as
    many and their names cannot tell: the checkpoint has none, or one name stands for two classes of
    the model; else by wnid for a model of the 1000 ImageNet classes.

    Raises
    ------
    DataError
        If none of the three applies, or if the model knows some of the names and not others.
    """
    classes = list(samples.classes)
    names = class_names(model) or []
    found = Counter(names)
    # a name that two classes bear ("crane") decides nothing
    if all(found[name] == 1 for name in classes):
        return _places(classes, names)
    unknown = [name for name in classes if name not in found]
    ambiguous = any(found[name] > 1 for name in classes)
    if names and len(unknown) < len(classes) and not ambiguous:
        raise DataError(
            f"the model does not know {len(unknown)} of the data's {len(classes)} classes:"
            f" {choices(unknown)};"
            f" its own are {choices(names)}"
        )
    if len(classes) == model.num_classes and (not names or ambiguous):
        return torch.arange(len(classes))
    wnids = ImageNetInfo().label_names()
    if model.num_classes == len(wnids) and set(classes) <= set(wnids):
        return _places(classes, wnids)
    raise DataError(
        f"the data's {len(classes)} classes ({classes[0]}, ...) do not match the model's"
        f" {model.num_classes}:"
        " take a model that names these classes, one with as many, or one of ImageNet's 1000"
        " for wnid folders"
    )


def _places(classes: list[str], names: list[str]) -> torch.Tensor:
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place[name] for name in classes])
