"""Matching of data classes to model classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bvit_interp.data.labels import label_map
from bvit_interp.errors import DataError


def data(*classes: str) -> SimpleNamespace:
    return SimpleNamespace(classes=classes)


def test_by_name_where_the_model_has_names(make):
    model = make(num_classes=4)
    model.pretrained_cfg["label_names"] = ["cat", "dog", "eel", "fox"]
    assert label_map(data("fox", "cat"), model).tolist() == [3, 0]
    assert label_map(data("fox", "eel", "cat", "dog"), model).tolist() == [3, 2, 0, 1]


def test_in_order_where_there_are_as_many(make):
    model = make(num_classes=3)
    assert label_map(data("a", "b", "c"), model).tolist() == [0, 1, 2]
    # bird and machine: decides nothing
    model.pretrained_cfg["label_names"] = [
        "crane",
        "crane",
        "owl",
    ]
    assert label_map(data("crane", "lift", "owl"), model).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="the data's 2 classes"):
        label_map(data("crane", "owl"), model)


@pytest.mark.parametrize(
    "classes", [("ant", "cat", "dog"), ("cat", "dog", "ant", "bee"), ("cat", "ant")]
)
def test_a_model_that_knows_some_of_the_classes_is_refused(make, classes):
    model = make(num_classes=3)
    model.pretrained_cfg["label_names"] = ["cat", "dog", "fox"]
    unknown = [name for name in classes if name in ("ant", "bee")]
    counts = rf"does not know {len(unknown)} of the data's {len(classes)} classes"
    message = rf"{counts}: {', '.join(unknown)}; .*cat, dog, fox"
    with pytest.raises(DataError, match=message):
        label_map(data(*classes), model)


def test_some_of_the_wnids_are_not_taken_for_imagenets(make):
    model = make(num_classes=1000)
    model.pretrained_cfg["label_names"] = ["n01443537", *(f"other {i}" for i in range(999))]
    with pytest.raises(DataError, match="classes: n01440764; its own are n01443537, other 0"):
        label_map(data("n01440764", "n01443537"), model)


def test_numbers_are_names_like_others(make):
    """digits-s is named 0..9: a model of ten other things must not be scored on it in silence."""
    model = make(num_classes=3)
    assert label_map(data("0", "1", "2"), model).tolist() == [0, 1, 2]
    model.pretrained_cfg["label_names"] = ["cat", "dog", "fox"]
    with pytest.raises(DataError, match="the data's 3 classes .* do not match the model's 3"):
        label_map(data("0", "1", "2"), model)
    model.pretrained_cfg["label_names"] = ["1", "2", "3"]
    with pytest.raises(DataError, match="the data's 3 classes: 0;"):
        label_map(data("0", "1", "2"), model)


def test_by_wnid_for_a_model_of_imagenet(make):
    """n01440764 (tench) is class 0, n01443537 (goldfish) 1, n15075141 (toilet tissue) the last."""
    wnids = data("n01443537", "n15075141", "n01440764")
    assert label_map(wnids, make(num_classes=1000)).tolist() == [1, 999, 0]


@pytest.mark.parametrize(
    ("classes", "count"), [(("cat", "dog"), 1000), (("n01443537",), 10), (("cat", "dog"), 3)]
)
def test_else_both_counts_are_named(make, classes, count):
    message = f"the data's {len(classes)} classes .* the model's {count}: take a model"
    with pytest.raises(DataError, match=message):
        label_map(data(*classes), make(num_classes=count))


def test_as_many_classes_of_other_names_are_not_the_same_classes(make):
    model = make()
    model.pretrained_cfg["label_names"] = [str(digit) for digit in range(10)]
    with pytest.raises(DataError, match="do not match the model's 10"):
        label_map(data(*"abcdefghij"), model)
