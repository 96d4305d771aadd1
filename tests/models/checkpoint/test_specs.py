"""How a checkpoint is written: what is read from it, and what it is called."""

from __future__ import annotations

import pytest

from bvit_interp.errors import CheckpointError
from bvit_interp.models.checkpoint import display_name, location, versions
from bvit_interp.models.checkpoint.specs import Spec, parse

READ = {
    "folder": Spec("folder", "path", "folder"),
    "folder@ema": Spec("folder@ema", "path", "folder", version="@ema"),
    "a/w.pth@ema@size=48x32": Spec(
        "a/w.pth@ema@size=48x32", "path", "a/w.pth", version="@ema", size=(48, 32)
    ),
    "timm:x": Spec("timm:x", "timm", "x"),
    "timm:x@random@size=48": Spec("timm:x@random@size=48", "timm", "x", random=True, size=(48, 48)),
    "timm:x@a.pth@ema": Spec("timm:x@a.pth@ema", "timm", "x", file="a.pth", version="@ema"),
    "torchvision:x@random": Spec("torchvision:x@random", "torchvision", "x", random=True),
    "hf:a/b@loop=vit.layers": Spec("hf:a/b@loop=vit.layers", "hf", "a/b", loop="vit.layers"),
    "module:a.b.make": Spec("module:a.b.make", "module", "a.b", "make"),
    "module:a.b:Nest.make": Spec("module:a.b:Nest.make", "module", "a.b", "Nest.make"),
    "a/b.py:make@size=8@loop=core": Spec(
        "a/b.py:make@size=8@loop=core", "python", "a/b.py", "make", loop="core", size=(8, 8)
    ),
    "timm:x@random@prefix=cls,reg@grid=4x8": Spec(
        "timm:x@random@prefix=cls,reg@grid=4x8",
        "timm",
        "x",
        random=True,
        prefix=("cls", "reg"),
        grid=(4, 8),
    ),
    "hf:a@prefix=@grid=7": Spec("hf:a@prefix=@grid=7", "hf", "a", prefix=(), grid=(7, 7)),
}


@pytest.mark.parametrize("text", READ)
def test_what_is_read(text):
    assert parse(text) == READ[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x@lop=a", "no option @lop=; options: @loop=PATH, @size=N, @prefix="),
        ("x@loop=", "@loop= needs the path"),
        ("x@size=0", "@size= is N or ROWSxCOLUMNS"),
        ("x@size=4x4x4", "@size= is N or ROWSxCOLUMNS"),
        ("x@size=-3", "@size= is N or ROWSxCOLUMNS"),
        ("x@grid=4x", "@grid= is N or ROWSxCOLUMNS in patches"),
        ("module:make", "say module:package.module.factory"),
        ("module:a:", "say module:package.module.factory"),
        ("a.py", "say which function makes the model: FILE.py:factory"),
        ("a.py:", "say which function makes the model: FILE.py:factory"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(CheckpointError, match=message):
        parse(text)


def test_a_path_that_is_there_is_meant_as_it_is(tmp_path):
    for name in ("run@size=8", "run@seed=3", "code.py"):
        (tmp_path / name).mkdir()
        assert parse(str(tmp_path / name)) == Spec(
            str(tmp_path / name), "path", str(tmp_path / name)
        )
        assert display_name(tmp_path / name) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b/tiny@ema", "tiny@ema"),
        ("a/b/tiny@loop=blocks.0", "tiny"),
        ("a/b/tiny@size=48", "tiny@size=48"),
        ("a/b/tiny@ema@size=48x32@loop=x", "tiny@ema@size=48x32"),
        ("timm:vit@random@loop=blocks", "vit@random"),
        ("timm:vit@random@grid=4x4@prefix=cls", "vit@random"),
        ("torchvision:vit_b_16@random", "vit_b_16@random"),
        ("hf:a/google-vit", "google-vit"),
        ("a/mine.py:make", "mine.make"),
        ("module:a.b.make", "b.make"),
    ],
)
def test_display_names(text, name):
    assert display_name(text) == name


@pytest.mark.parametrize("word", ["timm", "torchvision", "hf", "module"])
def test_a_folder_may_be_called_like_a_kind(word):
    """Only the colon makes it one."""
    assert parse(word) == Spec(word, "path", word)
    assert display_name(word) == word


def test_averaged_weights_keep_the_options(tmp_path):
    (tmp_path / "ema.safetensors").touch()
    assert versions(f"{tmp_path}@size=48") == [f"{tmp_path}@size=48", f"{tmp_path}@ema@size=48"]


def test_one_place_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for one, other in [
        ("a", "./a/"),
        ("a@ema", f"{tmp_path}/a@ema"),
        ("hf:a", f"hf:{tmp_path}/a"),
        ("m.py:make", "a/../m.py:make"),
    ]:
        assert location(one) == location(other)
    assert len({location(each) for each in ("a", "a@ema", "a@size=8", "hf:a", "timm:a")}) == 5
