"""Matching of data classes to model classes."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from timm.data import ImageNetInfo

from bvit_interp.data.catalog import open_samples
from bvit_interp.data.files import say
from bvit_interp.data.labels import evidence, label_map, match
from bvit_interp.data.options import LoaderOptions
from bvit_interp.data.samples import Subset
from bvit_interp.errors import DataError


def data(*classes: str, official: bool = False) -> SimpleNamespace:
    return SimpleNamespace(classes=classes, official=official)


@pytest.fixture
def named(make):
    """``named(names)``: a model whose checkpoint names its classes so."""

    def of(names):
        model = make(num_classes=len(names))
        model.pretrained_cfg["label_names"] = list(names)
        return model

    return of


# ---- names ---------------------------------------------------------------------------------------


def test_by_name_where_the_model_has_names(named):
    model = named(["cat", "dog", "eel", "fox"])
    assert label_map(data("fox", "cat"), model).tolist() == [3, 0]
    assert label_map(data("fox", "eel", "cat", "dog"), model).tolist() == [3, 2, 0, 1]


def test_names_in_another_case_and_spacing(named):
    model = named(["Fire Hydrant", "tench, Tinca tinca", "hot-dog"])
    assert label_map(data("hot_dog", "fire  hydrant"), model).tolist() == [2, 0]
    assert label_map(data("Tench", "hot dog"), model).tolist() == [1, 2]


def test_the_same_letters_decide_where_case_alone_differs(named):
    model = named(["Polish", "polish"])
    assert label_map(data("polish", "Polish"), model).tolist() == [1, 0]
    with pytest.raises(DataError):
        label_map(data("POLISH", "Polish"), model)


def test_equal_lists_match_though_a_name_is_borne_twice(named):
    model = named(["crane", "crane", "owl"])
    assert label_map(data("crane", "crane", "owl"), model).tolist() == [0, 1, 2]
    for classes in (("crane", "lift", "owl"), ("owl", "crane", "crane"), ("crane", "owl")):
        with pytest.raises(DataError):
            label_map(data(*classes), model)


@pytest.mark.parametrize(
    "classes", [("ant", "cat", "dog"), ("cat", "dog", "ant", "bee"), ("cat", "ant")]
)
def test_a_model_that_knows_some_of_the_classes_is_refused(named, classes):
    unknown = [name for name in classes if name in ("ant", "bee")]
    counts = rf"does not know {len(unknown)} of the data's {len(classes)} classes"
    message = rf"{counts}: {', '.join(unknown)}; .*cat, dog, fox"
    with pytest.raises(DataError, match=message):
        label_map(data(*classes), named(["cat", "dog", "fox"]))


# ---- position ------------------------------------------------------------------------------------


def test_position_alone_is_refused_and_the_option_named(make):
    model = make(num_classes=3)
    with pytest.raises(DataError, match="--classes position") as caught:
        label_map(data("a", "b", "c"), model)
    assert "\n" not in str(caught.value)
    assert label_map(data("a", "b", "c"), model, "position").tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="the data has 2 classes, the model 3"):
        label_map(data("a", "b"), model, "position")


def test_the_official_order_of_a_published_set_is_evidence(make, named):
    assert label_map(data("a", "b", official=True), make(num_classes=2)).tolist() == [0, 1]
    with pytest.raises(DataError, match="--classes"):
        label_map(data("a", "b", official=True), named(["c", "d"]))
    with pytest.raises(DataError):
        label_map(data("a", "b", official=True), make(num_classes=3))


def test_part_of_a_published_set_keeps_its_order(make):
    scenes = open_samples("digits-s")
    assert label_map(Subset(scenes, [3, 1]), make()).tolist() == list(range(10))
    part = Subset(data("a", "b", official=True), [0])
    assert label_map(part, make(num_classes=2)).tolist() == [0, 1]


# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_are_the_models_indices(make):
    """Folders sorted as strings: 0, 1, 10, 11, 2, ... (ImageNet-V2's layout)."""
    folders = sorted(map(str, range(12)))
    found = label_map(data(*folders), make(num_classes=12))
    assert found.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    padded = [f"{i:03d}" for i in range(12)]
    assert label_map(data(*padded), make(num_classes=12)).tolist() == list(range(12))


@pytest.mark.parametrize(
    "classes",
    [("1", "2", "3"), ("0", "2"), ("0", "1", "3"), ("0", "1", "01"), ("0", "1", "²"), ("0", "1")],
)
def test_numbers_that_are_not_0_to_n_decide_nothing(make, classes):
    with pytest.raises(DataError):
        label_map(data(*classes), make(num_classes=3))


def test_the_option_says_that_some_numbers_are_indices(make, named):
    for model in (make(num_classes=12), named("abcdefghijkl")):
        assert label_map(data("11", "3"), model, "index").tolist() == [11, 3]
    for classes in (("12",), ("cat",), ("-1",), ("3", "03")):
        with pytest.raises(DataError):
            label_map(data(*classes), make(num_classes=12), "index")


def test_numbers_are_names_like_others(named):
    """digits-s is named 0..9: a model of ten other things must not be scored on it in silence."""
    with pytest.raises(DataError, match="the data's 3 classes .* do not match the model's 3"):
        label_map(data("0", "1", "2"), named(["cat", "dog", "fox"]))
    with pytest.raises(DataError, match="the data's 3 classes: 0;"):
        label_map(data("0", "1", "2"), named(["1", "2", "3"]))
    assert label_map(data("0", "1", "2"), named(["2", "1", "0"])).tolist() == [2, 1, 0]


# ---- ImageNet ------------------------------------------------------------------------------------


def test_by_wnid_for_a_model_of_imagenet(make):
    """n01440764 (tench) is class 0, n01443537 (goldfish) 1, n15075141 (toilet tissue) the last."""
    wnids = data("n01443537", "n15075141", "n01440764")
    assert label_map(wnids, make(num_classes=1000)).tolist() == [1, 999, 0]


def test_by_imagenets_words(make):
    found = label_map(data("goldfish, Carassius auratus", "tench"), make(num_classes=1000))
    assert found.tolist() == [1, 0]


def test_a_model_that_names_imagenets_classes_by_their_words(named):
    """The first of several words, as published weights of torchvision have them."""
    words = [name.partition(",")[0] for name in ImageNetInfo().label_descriptions()]
    assert label_map(data("n15075141", "n01440764"), named(words)).tolist() == [999, 0]
    numbers = sorted(map(str, range(1000)))
    assert label_map(data(*numbers), named(words)).tolist() == [int(name) for name in numbers]
    # a thousand other classes, or the same in another order, are not ImageNet's
    for other in (words[::-1], [f"other {i}" for i in range(1000)]):
        with pytest.raises(DataError, match="do not match"):
            label_map(data("n15075141", "n01440764"), named(other))


def test_some_of_the_wnids_are_not_taken_for_imagenets(named):
    model = named(["n01443537", *(f"other {i}" for i in range(999))])
    with pytest.raises(DataError, match="classes: n01440764; its own are n01443537, other 0"):
        label_map(data("n01440764", "n01443537"), model)


# ---- what is refused, and what is said -----------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "count"), [(("cat", "dog"), 1000), (("n01443537",), 10), (("cat", "dog"), 3)]
)
def test_else_both_counts_are_named(make, classes, count):
    message = f"the data's {len(classes)} classes .* the model's {count}.*: take a model"
    with pytest.raises(DataError, match=message):
        label_map(data(*classes), make(num_classes=count))


def test_as_many_classes_of_other_names_are_not_the_same_classes(named):
    with pytest.raises(DataError, match="do not match the model's 10"):
        label_map(data(*"abcdefghij"), named("0123456789"))


def test_what_is_not_plain_is_said_once(named, make, caplog):
    say.cache_clear()
    with caplog.at_level(logging.WARNING):
        label_map(data("cat"), named(["cat", "dog"]))
        label_map(data("n01443537"), make(num_classes=1000))
        label_map(data("0", "1", "2"), make(num_classes=3))
        assert not caplog.records
        for _ in range(2):
            label_map(data("u", "v", "w"), make(num_classes=3), "position")
    (record,) = caplog.records
    assert "by position: u, v, w" in record.getMessage()
    assert "by name" in match(data("cat"), named(["cat", "dog"])).how


def test_the_default_leaves_older_tables_their_options():
    assert "classes" not in LoaderOptions().resume_key()
    assert LoaderOptions(classes="position").resume_key()["classes"] == "position"


def test_evidence_is_that_of_the_match_or_none(make, named):
    assert evidence(data("cat"), named(["cat", "dog"])) == "by name"
    model = make(num_classes=3)
    assert "numbers" in evidence(data("2", "0", "1"), model)
    assert "position" in evidence(data("u", "v", "w"), model, "position")
    assert evidence(data("u", "v", "w"), model) is None
