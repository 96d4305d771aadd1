"""Whatever text a user types: an answer, or one line that says what is wrong.

Every test throws drawn texts, and texts that are nearly right, at one reader of user input. An
exception of another kind than `UserError` is the failure.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bvit_interp import Probe
from bvit_interp.analyses import ANALYSES
from bvit_interp.cli.commands import find, question
from bvit_interp.cli.parsing import parse
from bvit_interp.data.catalog import open_samples
from bvit_interp.errors import UserError
from bvit_interp.models.checkpoint import specs
from bvit_interp.results import read_table
from bvit_interp.training.loop import recipe
from bvit_interp.vocabulary import SITES

SOME = settings(max_examples=150, deadline=None, derandomize=True)
ANY = st.text(max_size=20)
NUMBERS = st.sampled_from(["0", "1", "-1", "13", "1e3", "nan", "1.5", "", "999999999999", "*", "²"])
PARTS = [
    "z",
    "mlp_post",
    "inner2.",
    "[",
    "]",
    ":",
    "5",
    "-1",
    "@",
    "=",
    ",",
    "x",
    "/",
    "~",
    ".",
    " ",
]
NEARLY = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)


@pytest.fixture(scope="module")
def probe():
    from conftest import make_model

    return Probe(make_model(num_steps=3))


@SOME
@example("z[1]:-1").via("a head counted from the end")
@given(
    key=st.one_of(
        ANY, NEARLY, st.builds("{}[{}]:{}".format, st.sampled_from(list(SITES)), NUMBERS, NUMBERS)
    )
)
def test_a_key_of_an_edit(probe, key):
    def act():
        with probe.edit({key: lambda x, _: x}), torch.no_grad():
            probe(torch.zeros(1, 3, 32, 32))

    with suppress(UserError):
        act()


@SOME
@given(text=st.one_of(ANY, NEARLY, NEARLY.map("folder@{}".format), NEARLY.map("timm:{}".format)))
def test_a_checkpoint(text):
    with suppress(UserError):
        specs.parse(text)
        specs.display_name(text)


@SOME
@given(text=st.one_of(ANY, NEARLY, NEARLY.map("cifar10:{}".format), NEARLY.map("folder:{}".format)))
def test_a_data_set(text, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")

    def act():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(empty)
            patch.setenv("HOME", str(empty))
            open_samples(text)

    with suppress(UserError):
        act()


@SOME
@given(
    key=st.one_of(
        ANY, st.sampled_from(["lr", "epochs", "model.num_steps", "seed", "crop", "clip"])
    ),
    value=st.one_of(ANY, NUMBERS, st.sampled_from(["[1", "{a: b}", "null", "yes", "2026-11-28"])),
)
def test_a_setting_of_a_recipe(key, value):
    with suppress(UserError):
        recipe.read("digits-s", [f"{key}={value}"])


@SOME
@given(
    word=st.sampled_from(ANALYSES),
    flag=st.sampled_from(
        ["--limit", "--batch-size", "--seed", "--ckpt", "--n-jacobian", "--steps"]
    ),
    value=st.one_of(ANY, NUMBERS),
)
def test_an_option(word, flag, value):
    command = question(word)
    with suppress(UserError):
        parse(word, command.text, command.options, [flag, value])


@SOME
@given(words=st.lists(st.one_of(ANY, st.sampled_from(["early-exit", "data", "train"])), min_size=1))
def test_a_command(words):
    with suppress(UserError):
        find(words)


@SOME
@given(content=st.one_of(st.binary(max_size=200), ANY.map(str.encode), NEARLY.map(str.encode)))
def test_a_table(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    path.write_bytes(content)
    with suppress(UserError):
        read_table(path)
