"""The question of CONTRIBUTING.md, added to a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORD = "cls_length"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package with the question of CONTRIBUTING.md in it."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "bvit_interp", root / "bvit_interp")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    folder = root / "bvit_interp" / "analyses" / WORD
    folder.mkdir()
    for name, text in zip(("__init__", "measure", "plot"), blocks, strict=True):
        (folder / f"{name}.py").write_text(text)
    listed = root / "bvit_interp" / "analyses" / "__init__.py"
    before = listed.read_text()
    after = before.replace('    "circuits",\n)', f'    "circuits",\n    "{WORD}",\n)')
    assert after != before
    listed.write_text(after)
    return root


def run(copy, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "bvit_interp.cli", *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )


def test_the_question_is_a_command(copy):
    help_ = run(copy, WORD.replace("_", "-"), "--help")
    assert help_.returncode == 0, help_.stderr
    assert "--relative" in help_.stdout
    assert "cls-length" in run(copy, "--help").stdout


def test_it_is_answered_drawn_and_reported(copy, tmp_path):
    ckpt = str(ROOT / "checkpoints" / "bvit-digits-s")
    out = tmp_path / "out"
    given = ["--ckpt", ckpt, "--limit", "8", "--out", str(out)]
    found = run(copy, WORD.replace("_", "-"), *given)
    assert found.returncode == 0, found.stderr
    assert {path.name for path in out.iterdir()} == {
        f"{WORD}.{end}" for end in ("csv", "json", "png")
    }
    page = run(copy, "report", str(out))
    assert page.returncode == 0, page.stderr
    assert "How long is the CLS token" in (out / "report.html").read_text()


def test_its_code_is_as_all_code_is(copy):
    folder = copy / "bvit_interp" / "analyses" / WORD
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml")]
        found = subprocess.run([*ruff, str(folder)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
