"""The house: a question is a folder, one word in five places, captions, floors that point down."""

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
from bvit_interp.errors import UserError
from bvit_interp.results import read_table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bvit_interp"
MODULES = sorted(PACKAGE.rglob("*.py"))
INSTRUMENTS = [
    *(path for path in (PACKAGE / "probes").glob("*.py") if path.stem != "__init__"),
    *(
        path
        for path in (PACKAGE / "analyses").glob("*/*.py")
        if path.stem not in ("__init__", "measure", "plot")
    ),
]
FIRST_COLUMNS = {"model"}
FORBIDDEN_COLUMNS = {"kind", "part", "statistic", "answer", "measure", "top1"}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def caption(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def imports(path: Path) -> set[str]:
    """The names of all modules that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


# ---- a question is a folder -----------------------------------------


@pytest.mark.parametrize("word", ANALYSES)
def test_one_word_in_five_places(word):
    folder = PACKAGE / "analyses" / word
    for name in ("__init__", "measure", "plot"):
        assert (folder / f"{name}.py").is_file()
    tests = ROOT / "tests" / "analyses" / word
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= {
        path.stem.removeprefix("test_") for path in tests.glob("test_*.py")
    }
    assert len(list((ROOT / "notebooks").glob(f"???[0-9][0-9]_{word}.ipynb"))) == 1
    for suffix in ("csv", "png", "json"):
        assert (ROOT / "figures" / f"{word}.{suffix}").is_file()


def test_every_folder_is_in_the_tuple():
    folders = {path.parent.name for path in (PACKAGE / "analyses").glob("*/__init__.py")}
    assert folders == set(ANALYSES)


@pytest.mark.parametrize("word", ANALYSES)
def test_what_a_question_offers(word):
    question = importlib.import_module(f"bvit_interp.analyses.{word}")
    method = importlib.import_module(f"bvit_interp.analyses.{word}.measure")
    first, _, paragraph = inspect.cleandoc(question.__doc__).partition("\n\n")
    assert first.endswith("?")
    assert paragraph, "one paragraph for --help"
    assert "\n\n" not in paragraph
    assert "arXiv 2605.10661" in method.__doc__
    assert "Cost:" in method.__doc__
    assert "Expected:" in method.__doc__
    assert question.Config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(question.Config))
    assert all(question.COLUMNS.values())
    assert set(question.COLUMNS) >= FIRST_COLUMNS
    assert not FORBIDDEN_COLUMNS & set(question.COLUMNS)
    assert list(inspect.signature(question.measure).parameters)[:3] == ["models", "data", "config"]
    assert list(inspect.signature(question.plot).parameters) == ["frame"]
    assert list(inspect.signature(question.summary).parameters) == ["frame"]


@pytest.mark.parametrize("word", ANALYSES)
def test_measure_is_the_function_whatever_was_imported_first(word):
    code = (
        f"import bvit_interp.analyses.{word}.measure, bvit_interp.analyses.{word}.plot;"
        f"from bvit_interp.analyses import {word} as question;"
        "assert callable(question.measure) and callable(question.plot), question.measure"
    )
    if word == ANALYSES[0]:  # a process of its own takes seconds
        subprocess.run([sys.executable, "-c", code], check=True)
    else:
        exec(code, {})


@pytest.mark.parametrize("word", ANALYSES)
def test_columns_that_a_figure_misses_are_named(word):
    question = importlib.import_module(f"bvit_interp.analyses.{word}")
    lacking = [name for name in question.COLUMNS if name in ("model", "value")]
    frame = read_table(ROOT / "figures" / f"{word}.csv").drop(columns=lacking)
    for _ in range(2):  # the second time `plot` is loaded already
        with pytest.raises(UserError, match=rf"^{word}: the table lacks {', '.join(lacking)}; "):
            question.plot(frame)


def test_questions_import_nothing_heavy():
    code = (
        "import sys, importlib;"
        f"[importlib.import_module('bvit_interp.analyses.' + word) for word in {ANALYSES!r}];"
        "heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'timm', 'scipy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("word", ANALYSES)
def test_a_figure_needs_no_model(word):
    path = PACKAGE / "analyses" / word / "plot.py"
    allowed = {"plotting", "results", "metrics", "vocabulary", "errors", "analyses"}
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("bvit_interp.")}
    assert rooms <= allowed
    assert not {"torch", "timm"} & imports(path)


# ---- rooms -----------------------------------------


@pytest.mark.parametrize("path", INSTRUMENTS, ids=name_of)
def test_an_instrument_takes_a_model_and_tensors(path):
    rooms = {"loader", "options", "stream", "catalog", "samples", "partners"}
    assert not {f"bvit_interp.data.{room}" for room in rooms} & imports(path)


def test_the_pass_over_the_images_exists_once():
    for path in (PACKAGE / "analyses").glob("*/*.py"):
        text = path.read_text()
        assert "data.loader" not in text, path
        assert "parameters()).device" not in text or path in INSTRUMENTS, path


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys; import bvit_interp;"
        "heavy = {'torch', 'timm', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_models_are_registered_when_they_are_first_touched():
    code = (
        "import sys, timm, torchvision; before = set(sys.modules); from bvit_interp import BViT;"
        "heavy = {'captum', 'lucent', 'pacmap', 'matplotlib', 'sklearn', 'torchmetrics', 'pandas'};"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules);"
        "assert timm.is_model('bvit_base_patch16_224')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_short_caption(path):
    assert 1 <= len(caption(path).split()) <= 20
    if path.name != "__init__.py" or path.parent.parent.name != "analyses":
        assert len(caption(path).split()) <= 12, caption(path)


def test_imports_stand_at_the_top():
    optional = {"captum", "faiss", "lucent", "matplotlib", "pacmap", "pyarrow"}
    optional |= {"torch.utils.tensorboard", "transformers"}
    inside = []
    for path in MODULES:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                    if (node.module, node.names[0].name) == ("bvit_interp", "plotting"):
                        names = ["matplotlib"]  # plotting needs it
                elif isinstance(node, ast.Import):
                    names = [name.name for name in node.names]
                else:
                    continue
                roots = {name if name in optional else name.split(".")[0] for name in names}
                if not roots <= optional:
                    inside.append(f"{name_of(path)}:{node.lineno}")
    assert not inside, inside


def test_the_generated_documentation_is_up_to_date():
    found = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name
)
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
        assert path.is_relative_to(PACKAGE / "cli") or not re.search(r"\bprint\(", text), path
        assert "shared/data" not in text


def test_no_formatter_is_switched_off():
    for path in MODULES:
        assert "fmt: skip" not in path.read_text(), path


def test_no_file_that_is_kept_names_the_folder_of_this_clone():
    """Text files that git tracks; a clone in a folder of a short name proves nothing."""
    if len(ROOT.parts) < 3 or not (ROOT / ".git").exists():
        pytest.skip("not a clone in a folder of its own")
    found = subprocess.run(
        ["git", "grep", "-lIF", f"{ROOT}/"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 1, found.stdout + found.stderr
