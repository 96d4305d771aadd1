"""Pages of units: what they say is what the table says, and nothing is fetched."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bvit_interp import results
from bvit_interp.analyses import selectivity
from bvit_interp.data.digits import DigitScenes
from bvit_interp.report import page, unit_page


class Page(HTMLParser):
    """Cells, headings, links and pictures of a page."""

    void = frozenset({"meta", "img", "link", "br"})

    def __init__(self, path):
        super().__init__()
        self.open, self.cells, self.text, self.links, self.sources, self.tags = (
            [],
            [],
            [],
            [],
            [],
            set(),
        )
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.links += [values["href"]] if "href" in values else []
        self.sources += [values["src"]] if "src" in values else []
        if tag == "td":
            self.cells.append("")
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def pixels(source):
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    )


@pytest.fixture
def folder(tmp_path, tiny):
    """A result of the analysis: a neuron and a head of a model whose name a file cannot bear."""
    config = selectivity.Config(
        limit=20, n_ablated=2, random_units=1, threshold=0.0, units=("mlp_post:37", "z:1")
    )
    frame = selectivity.measure(
        {"runs/a<b@ema": tiny}, DigitScenes("test", length=20), config, tmp_path
    )
    results.write_table(frame, tmp_path / "selectivity.csv")
    return tmp_path


def read(folder):
    return results.read_table(folder / "selectivity.csv")


def test_a_page_for_each_described_unit(folder):
    links = unit_page.write(read(folder), folder, folder / "report.html")
    assert links == {
        "neuron 37 of runs/a<b@ema": "units/runs_a_b_ema_neuron37.html",
        "head 1 of runs/a<b@ema": "units/runs_a_b_ema_head1.html",
    }
    frame = read(folder)
    for site, unit, link in zip(("mlp_post", "z"), (37, 1), links.values(), strict=True):
        seen = Page(folder / link)
        assert seen.links == ["../report.html"]
        assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
        assert not seen.tags & {"script", "link", "iframe", "b"}
        own = frame[(frame["site"] == site) & (frame["unit"] == unit)]
        whole, stepwise = own[own["step"].isna()], own[own["step"].notna()]
        cells = np.array(seen.cells[: 4 * len(whole)]).reshape(-1, 4)
        for row, (name, value, null, rank) in zip(whole.itertuples(), cells, strict=True):
            assert name.split(" (")[0] == row.metric
            for said, number in ((value, row.value), (null, row.null), (rank, row.rank)):
                assert said == ("" if pd.isna(number) else f"{number:.4g}")
        cells = np.array(seen.cells[4 * len(whole) :]).reshape(-1, 7)
        assert list(cells[:, 1]) == list(stepwise["metric"])
        assert list(cells[:, 3]) == [
            "" if pd.isna(value) else f"{value:.4g}" for value in stepwise["value"]
        ]
        chart, images = map(pixels, seen.sources)
        assert chart.shape[1] > 900  # several panels
        stored = np.asarray(Image.open(stepwise["path"].dropna().iloc[0]))
        np.testing.assert_array_equal(images, stored)


def test_the_users_settings_of_figures_change_nothing(folder):
    frame, pages = read(folder), []
    frame = frame[frame["site"] == "z"]
    for settings in ({}, {"axes.titlesize": 25, "xtick.labelsize": 25, "lines.linewidth": 9}):
        with matplotlib.rc_context(settings):
            links = unit_page.write(frame, folder, folder / "r.html")
        pages.append([(folder / link).read_bytes() for link in links.values()])
    assert pages[0] == pages[1]


def test_the_summary_in_words(folder):
    frame = read(folder).astype({"class": object})  # digits are named by numbers
    chosen = frame["site"].eq("mlp_post") & frame["unit"].eq(37)
    for key, value in (("onset", 3), ("offset", 9), ("lifetime", 5), ("profile_change_ends", 0.75)):
        frame.loc[chosen & frame["metric"].eq(key), "value"] = value
    classes = {3: "seven", 9: "two"}
    for step, name in classes.items():
        frame.loc[chosen & frame["metric"].eq("selectivity") & frame["step"].eq(step), "class"] = (
            name
        )
    (link,) = (
        link
        for title, link in unit_page.write(frame, folder, folder / "r.html").items()
        if "neuron" in title
    )
    text = " ".join("".join(Page(folder / link).text).split())
    assert "Selective at 5 of 12 steps, from step 3 to step 9" in text
    assert "is seven at step 3, and two at step 9" in text
    assert "0.25" in text
    frame.loc[chosen & frame["metric"].eq("lifetime"), "value"] = 0
    unit_page.write(frame, folder, folder / "r.html")
    assert "Not selective at any of 12 steps" in "".join(Page(folder / link).text)


def test_without_pictures_and_without_units(folder, tmp_path):
    frame = read(folder)
    for picture in (folder / "selectivity").glob("*.png"):
        picture.unlink()
    links = unit_page.write(frame, folder, tmp_path / "elsewhere" / "page.html")
    seen = Page(tmp_path / "elsewhere" / links["head 1 of runs/a<b@ema"])
    assert len(seen.sources) == 1
    assert seen.links == ["../page.html"]
    assert unit_page.write(frame[["model", "value"]], folder, tmp_path / "page.html") == {}
    assert (
        unit_page.write(frame[frame["metric"] != "class_mean"], folder, tmp_path / "page.html")
        == {}
    )


def test_the_report_links_to_them(folder, monkeypatch):
    monkeypatch.setattr(page, "ANALYSES", ("selectivity",))
    seen = Page(page.write(folder))
    assert seen.links == [
        "#selectivity",
        "units/runs_a_b_ema_neuron37.html",
        "units/runs_a_b_ema_head1.html",
    ]
    assert all((folder / link).is_file() for link in seen.links[1:])
    assert "neuron 37 of runs/a<b@ema" in seen.text
    assert not re.search("https?://", (folder / seen.links[1]).read_text())
    assert not list(folder.rglob("*.partial"))
