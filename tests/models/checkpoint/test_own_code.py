"""Models of a user's own code, and what goes wrong in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from bvit_interp.errors import CheckpointError
from bvit_interp.models.checkpoint import class_names, load
from bvit_interp.models.looped import CalledSteps
from bvit_interp.results import weights_hash

CODE = '''
"""A looped model with a prelude and a coda."""
import torch
from torch import nn
from beside import WIDTH

class Looped(nn.Module):
    image_size = 16
    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "label_names": ["a", "b", "c"]}

    def __init__(self, steps=3):
        super().__init__()
        self.steps = steps
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        layer = dict(batch_first=True, dim_feedforward=16, dropout=0.0)
        self.prelude = nn.TransformerEncoderLayer(WIDTH, 2, **layer)
        self.core = nn.TransformerEncoderLayer(WIDTH, 2, **layer)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, images):
        tokens = self.prelude(self.embed(images).flatten(2).transpose(1, 2))
        for _ in range(self.steps):
            tokens = self.core(tokens)
        return self.head(tokens.mean(1))

def make():
    return Looped()

def once():
    return Looped(1)

def fails():
    width = 0
    return 1 / width

def number():
    return 3

def asks(size):
    return Looped()

def leaves():
    raise SystemExit("bye\\nbye")

def other_forward():
    model = Looped()
    model.image_size = 17
    model.embed = nn.Conv2d(4, WIDTH, 4, 4)
    model.forward = lambda images: images.no_such_thing
    return model

instance = Looped()
constant = 3
'''
LINE_OF_FAILS = CODE[: CODE.index("return 1 / width")].count("\n") + 1


@pytest.fixture
def file(tmp_path):
    """A Python file that imports another one beside it."""
    (tmp_path / "beside.py").write_text("WIDTH = 8\n")
    (tmp_path / "mine.py").write_text(CODE)
    yield tmp_path / "mine.py"
    for name in ("beside", "package_of_mine", "package_of_mine.mine"):
        sys.modules.pop(name, None)


@pytest.fixture
def package(file, monkeypatch):
    """The same as a package in the folder where the command runs."""
    folder = file.parent / "package_of_mine"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "mine.py").write_text(CODE)
    monkeypatch.chdir(file.parent)
    return "module:package_of_mine.mine"


def test_the_steps_are_the_calls_of_the_block(file):
    model = load(f"{file}:make")
    assert isinstance(model, CalledSteps)
    assert model.loop == ("core",)
    assert len(model.blocks) == 3
    assert not model.training
    assert class_names(model) == ["a", "b", "c"]
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    images = torch.randn(2, 3, 16, 16)
    own = model.model
    with torch.no_grad():
        tokens = own.prelude(own.embed(images).flatten(2).transpose(1, 2))
        for _ in range(3):
            tokens = model.blocks[0](tokens)
        torch.testing.assert_close(model(images), own.head(tokens.mean(1)))


def test_loop_and_size_of_the_images(file):
    named = load(f"{file}:make@loop=prelude@size=24")
    assert named.loop == ("prelude",)
    assert named.layout.grid == (6, 6)
    assert load(f"{file}:make", loop="prelude", image_size=24).layout == named.layout
    assert load(f"{file}:make", image_size=(24, 16)).layout.grid == (6, 4)


def test_prefix_and_grid_of_the_tokens(file):
    """Of its 16 tokens 4 are called registers, the others 2 rows of 6 patches."""
    layout = load(f"{file}:make@prefix=reg,reg,reg,reg@grid=2x6").layout
    assert (layout.prefix, layout.grid) == (("reg",) * 4, (2, 6))
    with pytest.raises(CheckpointError, match="no kind 'nose'; kinds: cls") as refusal:
        load(f"{file}:make@prefix=nose")
    assert "\n" not in str(refusal.value)


def test_weights_are_the_same_every_time_and_tell_loops_apart(file):
    state = torch.get_rng_state()
    first = load(f"{file}:make")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert weights_hash(load(f"{file}:make")) == weights_hash(first)
    assert weights_hash(load(f"{file}:make@loop=prelude")) != weights_hash(first)


@pytest.mark.parametrize("spelled", [".make", ":make", ":instance", ":Looped"])
def test_a_module_by_its_name(package, file, spelled):
    model = load(f"{package}{spelled}")
    assert model.loop == ("core",)
    if spelled == ".make":
        assert weights_hash(model) == weights_hash(load(f"{file}:make"))


def test_a_vision_transformer_of_timm_stays_itself(tmp_path):
    code = (
        "from timm.models.vision_transformer import VisionTransformer\n"
        "def make():\n"
        "    return VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2)\n"
        "class Twice(VisionTransformer):\n"
        "    def __init__(self):\n"
        "        super().__init__(32, 8, embed_dim=16, depth=1, num_heads=2)\n"
        "    def forward_features(self, x, **masks):\n"
        "        x = self._pos_embed(self.patch_embed(x))\n"
        "        return self.norm(self.blocks[0](self.blocks[0](x)))\n"
    )
    (tmp_path / "vit.py").write_text(code)
    assert isinstance(load(f"{tmp_path}/vit.py:make"), VisionTransformer)
    looped = load(f"{tmp_path}/vit.py:Twice")
    assert isinstance(looped, CalledSteps)
    assert len(looped.blocks) == 2


def test_paths_are_put_back(file):
    before = list(sys.path)
    load(f"{file}:make")
    with pytest.raises(CheckpointError):
        load(f"{file}:fails")
    assert sys.path == before


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("fails", rf"fails\(\) raised ZeroDivisionError at .*mine\.py:{LINE_OF_FAILS}: "),
        ("number", r"number\(\) returned int, not a torch\.nn\.Module"),
        ("asks", r"asks\(\) raised TypeError.*size"),
        ("leaves", r"leaves\(\) raised SystemExit at .*mine\.py:\d+: bye bye"),
        ("none", r"no 'none' in .*mine\.py; it has Looped, make, once, fails"),
        ("make.none", "no 'make.none' in"),
        ("constant", "constant is of type int, no function"),
        ("other_forward", "the forward of this Looped was replaced on the instance"),
        ("make@loop=cor", "cor"),
        ("make@size=2", "fails on two images"),
    ],
)
def test_one_line_for_what_goes_wrong(file, factory, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(f"{file}:{factory}")
    assert str(caught.value).startswith(f"{file}:{factory}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import torch\nx = = 3\n", r"raised SyntaxError at .*broken\.py:2: invalid syntax"),
        ("\nimport no_such_library\n", r"raised ModuleNotFoundError at .*broken\.py:2: No module"),
        ("\n\nprint(nobody)\n", r"raised NameError at .*broken\.py:3: name 'nobody'"),
    ],
)
def test_code_that_does_not_run(tmp_path, monkeypatch, code, message):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    for spec in (f"{tmp_path}/broken.py:make", "module:broken.make"):
        with pytest.raises(CheckpointError, match=message):
            load(spec)
        assert not [name for name in sys.modules if name.endswith("broken")]


def test_what_is_not_there(file, package):
    with pytest.raises(CheckpointError, match=r"no file at .*nowhere\.py"):
        load(f"{file.parent}/nowhere.py:make")
    with pytest.raises(CheckpointError, match="no module 'nowhere'"):
        load("module:nowhere.make")
    with pytest.raises(CheckpointError, match=r"no module 'package_of_mine\.other'"):
        load("module:package_of_mine.other.make")
    with pytest.raises(CheckpointError, match=r"no 'none' in module package_of_mine\.mine"):
        load(f"{package}.none")


def test_a_file_runs_only_if_it_is_named(tmp_path, saved_beside_code):
    load(saved_beside_code)
    assert not (saved_beside_code / "ran").exists()


@pytest.fixture
def saved_beside_code(tiny, tmp_path):
    from bvit_interp.models.checkpoint import save

    folder = save(tiny, tmp_path / "tiny")
    code = f"import pathlib; pathlib.Path({str(folder / 'ran')!r}).touch()"
    for name in ("model.py", "__init__.py", "modeling.py"):
        Path(folder, name).write_text(code)
    return folder


def test_weights_without_values(tmp_path):
    (tmp_path / "meta.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2, device='meta')\n"
    )
    with pytest.raises(CheckpointError, match="weight is a meta tensor"):
        load(f"{tmp_path}/meta.py:make")
