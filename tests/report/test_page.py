"""The page is one file: every figure and table in it, nothing fetched, nothing half-written."""

from __future__ import annotations

import ast
import base64
import errno
import html
import json
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

import bvit_interp
from bvit_interp import results
from bvit_interp.analyses import ANALYSES, energy_rank
from bvit_interp.errors import UserError
from bvit_interp.report import page

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)  # one pixel


def paragraphs(word, file):
    """The docstring of a file of an analysis, in paragraphs of one line."""
    source = Path(bvit_interp.__file__).parent / "analyses" / word / file
    text = ast.get_docstring(ast.parse(source.read_text()))
    return [" ".join(part.split()) for part in text.split("\n\n")]


class Page(HTMLParser):
    """What a browser would make of it: cells, headings, images, titles, and whatever would be
    fetched."""

    void = frozenset({"meta", "img", "link", "br"})

    def __init__(self, path):
        super().__init__()
        self.open, self.cells, self.headings, self.text = [], [], [], []
        self.links, self.sources, self.tags, self.meanings = [], [], set(), {}
        self.title = None
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.links += [values[key] for key in ("href", "action", "srcset", "data") if key in values]
        self.sources += [values["src"]] if "src" in values else []
        self.title = values.get("title")
        if tag in ("td", "h2", "th"):
            {"td": self.cells, "h2": self.headings, "th": []}[tag].append("")
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        where = self.open[-1] if self.open else ""
        if where in ("td", "h2"):
            {"td": self.cells, "h2": self.headings}[where][-1] += data
        if where == "th":
            self.meanings[data] = self.title


@pytest.fixture
def folder(tmp_path):
    """Results of all analyses: a table, a figure of its own bytes, and options."""
    for i, word in enumerate(ANALYSES):
        frame = pd.DataFrame(
            {"model": [f"{word}-model", "other"], "step": [1, 12], "rank": [0.123456, None]}
        )
        results.write_table(frame, tmp_path / f"{word}.csv")
        (tmp_path / f"{word}.png").write_bytes(PNG + bytes([i]))
        results.write_json(results.provenance({"limit": 100 + i}), tmp_path / f"{word}.json")
    return tmp_path


def test_one_file_with_every_figure_and_question(folder):
    path = page.write(folder)
    assert path == folder / "report.html"
    seen = Page(path)
    assert seen.headings == [paragraphs(word, "__init__.py")[0] for word in ANALYSES]
    assert all(heading.endswith("?") for heading in seen.headings)
    figures = [
        base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in seen.sources
    ]
    assert figures == [PNG + bytes([i]) for i in range(len(ANALYSES))]


def test_nothing_is_fetched(folder):
    seen = Page(page.write(folder))
    assert seen.links == [f"#{word}" for word in ANALYSES]
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert not seen.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    text = (folder / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    for word in ANALYSES:
        assert f'id="{word}"' in text  # where the links on the page lead


def test_tables_options_and_meanings(folder):
    seen = Page(page.write(folder))
    expected = []
    for word in ANALYSES:
        expected += [
            f"{word}-model",
            "1",
            "0.1235",
            "other",
            "12",
            "",
        ]  # four digits; nan is an empty cell
    assert seen.cells == expected
    text = "".join(seen.text)
    for i in range(len(ANALYSES)):
        assert f'"limit": {100 + i}' in text
    results.write_table(
        pd.DataFrame([dict.fromkeys([*energy_rank.COLUMNS, "added"], 1)]),
        folder / "energy_rank.csv",
    )
    for word in set(ANALYSES) - {"energy_rank"}:
        (folder / f"{word}.csv").unlink()
    assert Page(page.write(folder)).meanings == {**energy_rank.COLUMNS, "added": ""}


def test_summary_and_method_are_shown_in_full(folder):
    text = " ".join("".join(Page(page.write(folder)).text).split())
    for word in ANALYSES:
        for paragraph in paragraphs(word, "__init__.py") + paragraphs(word, "measure.py"):
            assert paragraph in text


def test_what_a_cell_holds_is_text(folder):
    evil = '<script>alert("1")</script> & <b>bold</b>'
    results.write_table(
        pd.DataFrame({"model": [evil], '<i title="x">': [1]}), folder / "energy_rank.csv"
    )
    results.write_json({"options": {"data": evil}}, folder / "energy_rank.json")
    seen = Page(page.write(folder))
    assert not seen.tags & {"script", "b", "i"}
    assert evil in seen.cells
    assert '<i title="x">' in seen.meanings
    assert json.dumps(evil)[1:-1] in "".join(seen.text)
    assert html.escape(evil, quote=False).split("alert")[0] in (folder / "report.html").read_text()


def test_a_folder_with_markup_in_its_name(tmp_path):
    folder = tmp_path / "a <b>&amp;"
    folder.mkdir()
    results.write_table(pd.DataFrame({"model": ["a"]}), folder / f"{ANALYSES[0]}.csv")
    seen = Page(page.write(folder))
    assert "b" not in seen.tags
    assert seen.text.count("a <b>&amp;") == 1  # the heading


def test_only_what_is_there_is_shown(folder):
    for word in ANALYSES[1:]:
        (folder / f"{word}.csv").unlink()
    word = ANALYSES[0]
    (folder / f"{word}.png").unlink()
    (folder / f"{word}.json").unlink()
    (folder / "notes.csv").write_text("a\n1\n")
    seen = Page(page.write(folder))
    assert len(seen.headings) == 1
    assert seen.sources == []
    assert "Options and versions" not in "".join(seen.text)


def test_letters_of_other_languages(folder):
    results.write_table(
        pd.DataFrame({"model": ["Müller Źdźbło 視覚"]}), folder / f"{ANALYSES[0]}.csv"
    )
    assert "Müller Źdźbło 視覚" in Page(page.write(folder)).cells


def test_another_place(folder, tmp_path):
    out = tmp_path / "new" / "page.html"
    assert page.write(folder, out) == out
    assert Page(out).headings
    assert not (folder / "report.html").exists()


# ---- what cannot be shown ----


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        page.write(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder .*file"):
        page.write(tmp_path / "file")


def test_a_folder_without_results(tmp_path):
    (tmp_path / "notes.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match="holds no results; a report needs one of ") as error:
        page.write(tmp_path)
    assert all(f"{word}.csv" in str(error.value) for word in ANALYSES)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.csv"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("csv", b""),
        ("csv", b'a,b\n1,"2'),
        ("csv", b"a,b\n1,2\n1,2,3,4\n"),
        ("csv", b"a\n\xff\xfe\n"),
        ("json", b"{"),
        ("json", b"\xff"),
    ],
)
def test_a_result_that_cannot_be_read_is_named_and_the_old_page_stays(folder, name, content):
    out = folder / "report.html"
    out.write_text("the old page")
    (folder / f"{ANALYSES[-1]}.{name}").write_bytes(content)
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(UserError, match=rf"{ANALYSES[-1]}\.{name}") as error:
        page.write(folder)
    assert "\n" not in str(error.value)
    assert out.read_text() == "the old page"
    assert sorted(file.name for file in folder.iterdir()) == before


def test_a_disk_that_fills_leaves_the_old_page(folder, monkeypatch):
    out = folder / "report.html"
    out.write_text("the old page")
    write = Path.write_text

    def full(self, text, *args, **kwargs):
        write(self, text[:100], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        page.write(folder)
    assert out.read_text() == "the old page"
    assert not [file for file in folder.iterdir() if file.name.endswith(".partial")]


def test_a_long_table_is_cut_and_says_so(tmp_path):
    word, rows = ANALYSES[0], page.SHOWN + 7
    results.write_table(
        pd.DataFrame({"model": ["m"] * rows, "step": range(rows)}), tmp_path / f"{word}.csv"
    )
    seen = Page(page.write(tmp_path))
    assert len(seen.cells) == 2 * page.SHOWN
    assert f"the first {page.SHOWN} of {rows} rows ({word}.csv" in "".join(seen.text)
