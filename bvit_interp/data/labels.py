"""Match a data set's classes to a model's, by evidence.

Position alone is no evidence. What is, in this order:

1. **names**, where the model's checkpoint names its classes: the same name; else the same name in
   any case, with "_", "-" and runs of spaces read as one space; else the same name before its first
   comma ("tench, Tinca tinca"). Every class of the data must be found, each at one place. Two equal
   lists of names match also where a name is borne twice ("crane");
2. **wnids, or ImageNet's words**, for a model of an ImageNet class list (1000 classes, 21841, ...)
   that names no classes, or those of that list in its order;
3. **numbers**: classes called 0 to n - 1, for a model of n classes that names none, or that are
   ImageNet's (a folder per index, as in ImageNet-V2). Class "10" is class 10, wherever it stands
   among the sorted folders. Names that are numbers in the model, as those of digits-s, are names;
4. **the official order** of a published set (CIFAR, Imagenette), for a model of as many classes
   that names none.

Anything else is refused, unless the option `classes` says how they match.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from bvit_interp.data.files import say
from bvit_interp.data.samples import Samples
from bvit_interp.errors import DataError, choices
from bvit_interp.models.checkpoint import class_names
from bvit_interp.models.looped import Model

By = Literal["auto", "index", "position"]
HELP = (  # in Python the option is Config(classes="position")
    "--classes position if class i of the data, in the order of its sorted names, is the model's"
    " class i, or --classes index if its names are the model's class indices"
)


@dataclass(frozen=True)
class Match:
    """The model's class of every class of a data set.

    Parameters
    ----------
    index : the model's class indices, ``(classes,)`` int64.
    how : the evidence, in words.
    plain : whether it needs no mention: the names are the same.
    """

    index: torch.Tensor
    how: str
    plain: bool = False


def label_map(samples: Samples, model: Model, by: By = "auto") -> torch.Tensor:
    """The model's class index of every class of the data set, ``(classes,)`` int64.

    As `match`; what is not plain is said on stderr, once.
    """
    found = match(samples, model, by)
    if not found.plain:
        say(f"the data's {len(samples.classes)} classes are matched to the model's {found.how}")
    return found.index


def match(samples: Samples, model: Model, by: By = "auto") -> Match:
    """How the classes of a data set match those of a model.

    Parameters
    ----------
    samples, model : the data set and the model.
    by : "auto" for the evidence above; "index" if the names of the data's classes are the model's
        class indices; "position" if class i is class i.

    Raises
    ------
    DataError
        If the classes do not match, or nothing but their number says that they do; the message
        names the option that says how.
    """
    classes, names = list(samples.classes), class_names(model) or []
    if by == "position":
        return _by_position(classes, model)
    if by == "index":
        return _by_index(classes, model)
    if classes and classes == names:
        return Match(torch.arange(len(classes)), "by name", plain=True)
    if found := _by_name(classes, names):
        return found
    if names and (some := _some_known(classes, names)):
        raise DataError(some)
    if found := _by_wnid(classes, names, model) or _by_number(classes, names, model):
        return found
    if not names and getattr(samples, "official", False) and len(classes) == model.num_classes:
        return Match(
            torch.arange(len(classes)), f"in the set's official order: {choices(classes, 3)}"
        )
    raise DataError(_refusal(classes, names, model))


def evidence(samples: Samples, model: Model, by: By = "auto") -> str | None:
    """How the classes match, in words, as of `match`; None if they do not."""
    try:
        return match(samples, model, by).how
    except DataError:
        return None


def _by_position(classes: list[str], model: Model) -> Match:
    if len(classes) != model.num_classes:
        raise DataError(
            f"--classes position: the data has {len(classes)} classes, the model"
            f" {model.num_classes}"
        )
    return Match(torch.arange(len(classes)), f"by position: {choices(classes, 3)}")


def _by_index(classes: list[str], model: Model) -> Match:
    wrong = [name for name in classes if not _is_number(name) or int(name) >= model.num_classes]
    if wrong:
        raise DataError(
            f"--classes index: {choices(wrong, 3)} is no class index of the model,"
            f" 0 to {model.num_classes - 1}"
        )
    return Match(_distinct(classes), "by index, their names")


def _by_name(classes: list[str], names: list[str]) -> Match | None:
    """The first way of reading names in which each class of the data is one class of the model."""
    for read, how in _READINGS:
        own, sought = [read(name) for name in names], [read(name) for name in classes]
        count = Counter(own)
        if len(set(sought)) == len(sought) and all(count[name] == 1 for name in sought):
            place = {name: i for i, name in enumerate(own)}
            return Match(
                torch.tensor([place[name] for name in sought]), how, plain=how == "by name"
            )
    return None


def _by_wnid(classes: list[str], names: list[str], model: Model) -> Match | None:
    """By ImageNet's own names, for a model of its class list in its order."""
    lists = _imagenet(model.num_classes)
    if lists is None or (names and not _are_imagenets(names, lists)):
        return None
    wnids, words = lists
    if set(classes) <= set(wnids):
        place = {wnid: i for i, wnid in enumerate(wnids)}
        return Match(torch.tensor([place[name] for name in classes]), "by wnid", plain=True)
    found = _by_name(classes, words)
    return found and Match(found.index, "by ImageNet's words")


def _by_number(classes: list[str], names: list[str], model: Model) -> Match | None:
    """By the numbers 0 to n - 1, where the model's own names do not say otherwise."""
    if not all(map(_is_number, classes)):
        return None
    if sorted(map(int, classes)) != list(range(model.num_classes)):
        return None
    lists = _imagenet(model.num_classes)
    if names and not (lists and _are_imagenets(names, lists)):
        return None
    index = _distinct(classes)
    in_order = index.tolist() == list(range(len(classes)))
    return Match(index, f"by their numbers, 0 to {len(classes) - 1}", plain=in_order)


def _some_known(classes: list[str], names: list[str]) -> str | None:
    """What is wrong if the model knows some of the classes and not others."""
    read = _READINGS[-1][0]
    known = {read(name) for name in names}
    unknown = [name for name in classes if read(name) not in known]
    if not unknown or len(unknown) == len(classes):
        return None
    return (
        f"the model does not know {len(unknown)} of the data's {len(classes)} classes:"
        f" {choices(unknown)}; its own are {choices(names)}"
    )


def _refusal(classes: list[str], names: list[str], model: Model) -> str:
    own = f" ({choices(names, 3)})" if names else ", which it does not name"
    said = (
        f"the data's {len(classes)} classes ({choices(classes, 3)}) do not match the model's"
        f" {model.num_classes}{own}"
    )
    numbers = all(_is_number(name) and int(name) < model.num_classes for name in classes)
    if len(classes) == model.num_classes or numbers:
        return f"{said}: say {HELP}"
    return (
        f"{said}: take a model that names these classes, or one of ImageNet's 1000 for wnid folders"
    )


def _spaced(name: str) -> str:
    """A name in one case, with one space for "_", "-" and runs of spaces."""
    name = unicodedata.normalize("NFC", name)  # file systems write accents in two ways
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


_READINGS: tuple[tuple[Callable[[str], str], str], ...] = (
    (str, "by name"),
    (_spaced, "by name, in any case and spacing"),
    (lambda name: _spaced(name.partition(",")[0]), "by name, before the first comma"),
)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def _distinct(classes: list[str]) -> torch.Tensor:
    numbers = [int(name) for name in classes]
    if twice := [n for n, count in Counter(numbers).items() if count > 1]:
        raise DataError(f"two classes of the data have the number {twice[0]}: keep one of them")
    return torch.tensor(numbers, dtype=torch.int64)


@lru_cache
def _imagenet(num_classes: int) -> tuple[list[str], list[str]] | None:
    """Wnids and words of the ImageNet list of so many classes, or None."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return list(info.label_names()), list(info.label_descriptions())


def _are_imagenets(names: Sequence[str], lists: tuple[list[str], list[str]]) -> bool:
    """Whether a model's names are ImageNet's in its order, for nine of ten classes of it.

    Published lists differ in the words of some classes ("crane bird"), so a name is compared with
    all synonyms.
    """
    if len(names) != len(lists[0]):
        return False
    right = sum(
        _spaced(name) == wnid or bool(_synonyms(name) & _synonyms(words))
        for name, wnid, words in zip(names, *lists, strict=True)
    )
    return right >= 0.9 * len(names)


def _synonyms(words: str) -> set[str]:
    return {_spaced(word) for word in words.split(",")}
