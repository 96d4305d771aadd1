"""Lines differ in grey, and figures keep their style whatever the user's settings."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from drawing import two_lines
from matplotlib.colors import to_rgb
from PIL import Image

from bvit_interp import plotting
from bvit_interp.analyses import ANALYSES

TABLES = Path(__file__).resolve().parents[2] / "figures"
HOSTILE = {
    "origin": {"image.origin": "lower"},
    "dark": dict(matplotlib.style.library["dark_background"]),
    "usetex": {"text.usetex": True},
    "look": {"font.size": 22, "axes.grid": True, "lines.linewidth": 7, "savefig.bbox": "tight"},
}


def test_lines_differ_without_colour():
    styles = [plotting.line_style(i) for i in range(28)]
    assert len({(style["marker"], style["linestyle"]) for style in styles}) == 28
    for one, other in itertools.combinations(styles[:4], 2):  # the first ones in every respect
        assert all(one[key] != other[key] for key in ("color", "marker", "linestyle"))
    assert (
        len({style["color"] for style in styles[:7]})
        == len({style["marker"] for style in styles[:7]})
        == 7
    )


def test_neighbouring_lines_never_share_a_dash():
    for i in range(28):
        assert plotting.line_style(i)["linestyle"] != plotting.line_style(i + 1)["linestyle"]
    assert len({to_rgb(colour) for colour in plotting.COLOURS}) == len(plotting.COLOURS)


def test_a_style_is_what_matplotlib_draws():
    _, axes = plotting.canvas()
    (line,) = axes[0, 0].plot([1, 2], [1, 2], **plotting.line_style(1))
    assert (line.get_marker(), line.get_linestyle(), line.get_color()) == ("s", "--", "#D55E00")


def example():
    """Every mark of the house, with text set before and after."""
    figure, axes = plotting.canvas(2, 2)
    mask = np.zeros((16, 16), bool)
    mask[:4, 2:14] = True
    picture = np.repeat(mask[..., None], 3, -1).astype(float)
    plotting.overlay(axes[0, 0], picture, np.arange(16.0).reshape(4, 4), mask)
    values = np.arange(4.0).reshape(2, 2)
    plotting.heat_map(figure, axes[0, 1], values, [1, 2], ["h_0", "h$1"], "hit ratio")
    plotting.title(axes[0, 1], "bvit_base")
    two_lines(axes[1, 0], [0.1, 0.2])
    plotting.legend(axes[1, 0])
    frame = pd.DataFrame({"value": [0.5], "low": [0.4], "high": [0.6]})
    plotting.points(axes[1, 1], [1], frame, style=plotting.line_style(1))
    plotting.log_axis(axes[1, 1])
    return figure


@pytest.mark.parametrize("settings", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("how", ["save", "savefig"])
def test_the_users_settings_change_nothing(settings, how, tmp_path):
    def pixels(name):
        path = tmp_path / name
        if how == "save":
            plotting.save(example(), path)
        else:  # what a user may do with a figure of ours
            example().savefig(path)
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    wanted = pixels("own.png")
    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams)
        found = pixels("user.png")
        assert dict(matplotlib.rcParams) == before  # and the user keeps them
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("word", ANALYSES)
def test_every_question_is_drawn_in_the_style_of_the_house(word):
    table = TABLES / f"{word}.csv"
    if not table.exists():
        pytest.skip(f"{table} is not there")
    frame = pd.read_csv(table)
    module = importlib.import_module(f"bvit_interp.analyses.{word}.plot")
    settings = HOSTILE["origin"] | HOSTILE["dark"] | HOSTILE["usetex"]
    with matplotlib.rc_context(settings):
        figure = module.plot(frame)
    assert isinstance(figure, plotting.HouseFigure)
    for ax in figure.axes:
        assert to_rgb(ax.get_facecolor()) == (1, 1, 1) or ax.texts  # grey: a file is missing
        assert all(image.origin == "upper" for image in ax.images)
        texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        assert not any(text.get_usetex() or text.get_parse_math() for text in texts)
