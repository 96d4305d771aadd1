"""The house: one word in five places, five things in a room, captions that agree, floors that point
down."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bvit_interp.analyses import ANALYSES
from bvit_interp.vocabulary import SITES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bvit_interp"
MODULES = sorted(PACKAGE.rglob("*.py"))


def caption(path):
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


@pytest.mark.parametrize("word", ANALYSES)
def test_one_word_in_five_places(word):
    assert (PACKAGE / "analyses" / f"{word}.py").is_file()
    assert (ROOT / "tests" / "analyses" / f"test_{word}.py").is_file()
    assert (
        len(list((ROOT / "notebooks").glob(f"???[0-9][0-9]_{word}.ipynb"))) == 1
    )  # figNN_ or tabNN_
    for kind in ("csv", "png", "json"):
        assert (ROOT / "figures" / f"{word}.{kind}").is_file()
    assert f"bvit-interp {word.replace('_', '-')}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("word", ANALYSES)
def test_the_room_of_an_analysis(word):
    module = importlib.import_module(f"bvit_interp.analyses.{word}")
    assert module.__doc__.splitlines()[0].endswith("?")
    assert "arXiv 2605.10661" in module.__doc__
    assert "Cost:" in module.__doc__
    assert "Expected:" in module.__doc__
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert public == {"Config", "measure", "plot"}
    assert module.Config.__dataclass_params__.frozen
    assert all(f.kw_only for f in dataclasses.fields(module.Config))
    assert all(module.COLUMNS.values())
    assert list(inspect.signature(module.measure).parameters)[:3] == ["models", "data", "config"]
    assert list(inspect.signature(module.plot).parameters) == ["frame"]


def test_every_analysis_is_in_the_tuple():
    files = {path.stem for path in (PACKAGE / "analyses").glob("*.py")} - {"__init__"}
    assert files == set(ANALYSES)


def test_analyses_import_without_torch_pandas_and_matplotlib():
    code = (
        "import sys; sys.argv[0] = 'bvit-interp'; import importlib;"
        f"[importlib.import_module('bvit_interp.analyses.' + word) for word in {ANALYSES!r}];"
        "assert not {'torch', 'pandas', 'matplotlib', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_takes_torch_and_timm_and_nothing_heavier():
    code = (
        "import sys, timm, torchvision; before = set(sys.modules); import bvit_interp;"
        "heavy = {'captum', 'lucent', 'pacmap', 'matplotlib', 'sklearn', 'torchmetrics', 'pandas'};"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules);"
        "assert timm.is_model('bvit_base_patch16_224')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_is_short_and_captioned(path):
    assert len(path.read_text().splitlines()) <= 400
    assert caption(path), f"{path} has no docstring"


def tree_of_the_readme():
    """Path in the package -> what the README's tree says of it."""
    listed, folder = {}, Path()
    tree = (
        (ROOT / "README.md")
        .read_text()
        .partition("\nbvit_interp/\n")[2]
        .partition("\ncheckpoints/")[0]
    )
    for line in tree.splitlines():
        name, _, says = line.strip().partition("  ")
        folder = Path(name) if name.endswith("/") else folder if line.startswith("    ") else Path()
        if not name.endswith("/"):
            listed[folder / name] = says.strip()
    return listed


def test_the_readme_tree_says_what_the_modules_say():
    says = {
        path.relative_to(PACKAGE): caption(path).rstrip(".")
        for path in MODULES
        if path.name != "__init__.py"
    }
    listed = tree_of_the_readme()
    assert set(listed) == set(says)
    for path, short in listed.items():
        assert says[path].startswith(short.rstrip(".")), (path, short, says[path])


def test_the_readme_has_the_table_of_sites():
    readme = (ROOT / "README.md").read_text()
    for site, (shape, place) in SITES.items():
        assert f"| `{site}` | `{shape}` | {place} |" in readme


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_have_no_def_and_no_output(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert not re.search(r"^\s*(def|class) ", "".join(cell["source"]), re.MULTILINE)


def test_no_print_and_no_path_of_a_machine_in_the_package():
    for path in MODULES:
        text = path.read_text()
        assert path.parent.name == "cli" or not re.search(r"\bprint\(", text), path
        assert "shared/data" not in text
