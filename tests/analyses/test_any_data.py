"""Every question takes a data set of torchvision's kind, as it is."""

from __future__ import annotations

import importlib

import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_runs import table

from bvit_interp.analyses import ANALYSES, evaluate, patching
from bvit_interp.data.adapters import from_tensors
from bvit_interp.data.digits import DigitScenes
from bvit_interp.errors import UserError

STEPS = {word: {"steps": 4} for word in ("step_accuracy", "trajectories", "dynamics", "stability")}
"""Fewer than by default, which is past the trained ones."""
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")


class Pictures:
    """Scenes of digits-s as torchvision gives them: (picture, label) by index, and `classes`."""

    def __init__(self, length):
        scenes = DigitScenes(length=length)
        read = [scenes.read(i) for i in range(length)]
        self.items = [(Image.fromarray(image), label) for image, label, _ in read]
        self.classes = list(scenes.classes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize("word", [word for word in ANALYSES if word != "pointing_game"])
def test_a_question_takes_them(word, make, tmp_path):
    options = {"limit": 12, **STEPS.get(word, {})}
    frame = table(word, make(num_steps=4), Pictures(14), tmp_path, **options)
    assert list(frame) == list(importlib.import_module(f"bvit_interp.analyses.{word}").COLUMNS)
    assert set(frame["model"]) == {"m"}


def test_a_question_about_masks_says_that_there_are_none(make, tmp_path):
    with pytest.raises(UserError, match="masks"):
        table("pointing_game", make(), Pictures(4), tmp_path)


def test_partners_and_labels_are_those_of_the_same_pixels_in_memory(make):
    pictures, config = Pictures(6), patching.Config(resize=37)
    read = [DigitScenes(length=6).read(i) for i in range(6)]
    scenes = from_tensors(
        torch.stack([torch.from_numpy(image).movedim(-1, 0) for image, _, _ in read]),
        [label for _, label, _ in read],
        classes=pictures.classes,
    )
    models = {"m": make(num_steps=2)}
    pd.testing.assert_frame_equal(
        patching.measure(models, data=pictures, config=config),
        patching.measure(models, scenes, config),
    )


@pytest.mark.parametrize("word", [word for word in ANALYSES if word != "cost"])
def test_nothing_is_no_data(word):
    question = importlib.import_module(f"bvit_interp.analyses.{word}")
    with pytest.raises(UserError, match="NoneType"):
        question.measure({}, None, question.Config())


def test_the_name_of_a_data_set_is_taken(make):
    frame = evaluate.measure({"m": make()}, "digits-s", evaluate.Config(limit=5))
    assert frame["n"].iloc[0] == 5
