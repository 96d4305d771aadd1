"""The house style keeps its word: whole steps, lines that differ in grey, numbers in cells, whole
files."""

from __future__ import annotations

import errno
import importlib
import itertools
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from bvit_interp import plotting
from bvit_interp.analyses import ANALYSES


def drawn(figure):
    """The figure after layout and drawing, as pixels ``(height, width, 3)`` 0..255."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def test_canvas_is_a_grid_of_panels_in_inches():
    figure, axes = plotting.canvas(columns=3, rows=2, width=2.0, height=1.5)
    assert isinstance(figure, Figure)
    assert tuple(figure.get_size_inches()) == (6.0, 3.0)
    assert axes.shape == (2, 3)
    assert plotting.canvas()[1].shape == (1, 1)
    assert not any(ax.spines[side].get_visible() for ax in axes.flat for side in ("top", "right"))


def test_figures_are_not_kept_by_pyplot():
    from matplotlib import pyplot

    plotting.canvas()
    assert pyplot.get_fignums() == []


# ---- lines ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("steps", "ticks"),
    [(range(1, 13), list(range(1, 13))), ([3, 1, 3, 2.0], [1, 2, 3]), ([5], [5])],
)
def test_every_step_has_its_tick(steps, ticks):
    figure, axes = plotting.canvas()
    ax = axes[0, 0]
    ax.plot(list(steps), list(steps))
    plotting.step_axis(ax, steps)
    drawn(figure)
    assert ax.get_xticks().tolist() == ticks
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(tick) for tick in ticks]
    assert ax.get_xlabel() == "step"


@pytest.mark.parametrize("last", [14, 24, 48])
def test_ticks_of_many_steps_are_whole(last):
    figure, axes = plotting.canvas()
    ax = axes[0, 0]
    ax.plot(range(1, last + 1), range(1, last + 1))
    plotting.step_axis(ax, range(1, last + 1))
    drawn(figure)
    ticks = ax.get_xticks()
    assert np.array_equal(ticks, ticks.round())
    assert 3 <= len(ticks) <= 13
    assert ticks.min() == 1 and ticks.max() <= last  # only steps that there are


def test_a_legend_only_where_something_is_labelled():
    figure, axes = plotting.canvas(columns=2)
    axes[0, 0].plot([1, 2])
    axes[0, 1].plot([1, 2], label="bViT")
    for ax in axes.flat:
        plotting.legend(ax)
    assert axes[0, 0].get_legend() is None
    legend = axes[0, 1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["bViT"]
    axes[0, 1].plot([0], [0], label="a" * 60 + "end")
    plotting.legend(axes[0, 1])
    long = axes[0, 1].get_legend().get_texts()[1].get_text()
    assert long == "..." + "a" * (plotting.LONGEST_LABEL - 6) + "end"
    assert legend.get_frame().get_edgecolor()[3] == 0  # no frame
    drawn(figure)


def entries(legend):
    return [text.get_text() for text in legend.get_texts()]


def two_lines(ax, nulls, **options):
    """Two lines named "a" and "b" over three steps, with the given nulls."""
    for i, (name, null) in enumerate(zip("ab", nulls, strict=True)):
        frame = pd.DataFrame(
            {"step": [1, 2, 3], "value": 0.5, "low": 0.4, "high": 0.6, "null": null}
        )
        label = None if i else "null: chance"
        style = plotting.line_style(i)
        plotting.line(
            ax, frame, "step", style=style, label=name, null="null", null_label=label, **options
        )


def test_the_legend_says_what_a_band_is():
    _, axes = plotting.canvas()
    two_lines(axes[0, 0], [0.1, 0.1])
    plotting.legend(axes[0, 0])
    assert entries(axes[0, 0].get_legend()) == ["a", "b", "null: chance", "95 % interval"]
    _, axes = plotting.canvas()
    two_lines(axes[0, 0], [0.1, 0.1], interval_label="range over heads")
    plotting.legend(axes[0, 0])
    assert entries(axes[0, 0].get_legend())[-1] == "range over heads"
    _, axes = plotting.canvas()
    two_lines(axes[0, 0], [0.1, 0.1], interval=None)
    plotting.legend(axes[0, 0])
    assert entries(axes[0, 0].get_legend()) == ["a", "b", "null: chance"]


def test_nulls_of_two_models_differ_in_colour():
    _, axes = plotting.canvas()
    two_lines(axes[0, 0], [0.1, 0.2])
    own = [line.get_color() for line in axes[0, 0].lines]
    assert len({to_rgb(colour) for colour in own}) == 4
    plotting.legend(axes[0, 0])
    shown = {to_rgb(part.get_color()) for part in axes[0, 0].get_legend().findobj(Line2D)}
    assert {to_rgb(colour) for colour in own} <= shown


def test_a_null_of_all_models_is_grey():
    _, axes = plotting.canvas()
    two_lines(axes[0, 0], [0.1, 0.1])
    first, second = axes[0, 0].lines[1], axes[0, 0].lines[3]
    assert first.get_color() == second.get_color() == plotting.NULL["color"]


def test_a_legend_of_several_panels_names_each_line_once():
    figure, axes = plotting.canvas(columns=2)
    height = figure.get_figheight()
    for ax in axes.flat:
        two_lines(ax, [0.1, 0.2])
    plotting.legend_below(figure, axes.flat)
    (legend,) = figure.legends
    assert entries(legend) == ["a", "b", "null: chance", "95 % interval"]
    assert figure.get_figheight() > height  # the panels keep their size
    drawn(figure)
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_tightbbox()) for ax in axes.flat)


@pytest.mark.parametrize("mark", ["line", "points"])
@pytest.mark.parametrize("name", ["_old", "lr$1e-3_wd$5", "a_b^c", r"$\frac{", "$x$"])
def test_names_appear_as_they_are(name, mark):
    figure, axes = plotting.canvas()
    ax, frame = axes[0, 0], pd.DataFrame({"step": [1, 2], "value": [0.5, 0.6]})
    options = {"style": plotting.line_style(0), "label": name, "interval": None}
    if mark == "line":
        plotting.line(ax, frame, "step", **options)
    else:
        plotting.points(ax, [1, 2], frame, **options)
    plotting.title(ax, name)
    plotting.legend(ax)
    plotting.legend_below(figure, [ax])
    drawn(figure)  # a formula that is none would raise here
    written = [ax.title, *ax.get_legend().get_texts(), *figure.legends[0].get_texts()]
    assert [text.get_text() for text in written] == [name] * 3
    assert not any(text.get_parse_math() or text.get_usetex() for text in written)


def test_a_long_title_stays_over_its_panel():
    figure, axes = plotting.canvas(columns=2)
    for ax in axes.flat:
        plotting.title(ax, "vit-of-many-words-" * 6 + ": accuracy")
    drawn(figure)
    left, right = (ax.title.get_window_extent() for ax in axes.flat)
    assert not left.overlaps(right)
    assert left.x0 >= 0 and right.x1 <= figure.bbox.width


def test_shares_end_where_shares_end():
    _, axes = plotting.canvas()
    ax = axes[0, 0]
    ax.plot([0, 1], [0.0, 0.2])
    plotting.share_axis(ax, whole=False)
    assert ax.get_ylim() == (0, pytest.approx(0.21))
    plotting.share_axis(ax)
    assert ax.get_ylim() == (0, 1.02)


def test_empty_panels_are_left_out():
    figure, axes = plotting.canvas(columns=3, rows=2, width=2.0, height=1.0)
    for ax in (axes[0, 0], axes[0, 2]):
        ax.plot([0, 1], [0, 1])
    plotting.heat_map(figure, axes[1, 1], np.zeros((2, 2)), [1, 2], [1, 2], "x")
    plotting.leave_out_empty(figure, axes)
    assert tuple(figure.get_size_inches()) == (6, 1)
    drawn(figure)
    boxes = [ax.get_window_extent() for ax in (axes[0, 0], axes[0, 2], axes[1, 1])]
    assert len({round(box.y0) for box in boxes}) == 1  # in one row
    assert boxes[0].x1 < boxes[1].x0 < boxes[1].x1 < boxes[2].x0


def test_a_legend_below_hides_nothing():
    figure, axes = plotting.canvas(width=4, height=4)
    ax = axes[0, 0]
    two_lines(ax, [0.1, 0.2])
    plotting.step_axis(ax, [1, 2, 3])
    plotting.legend(ax, below=True)
    drawn(figure)
    box = ax.get_legend().get_window_extent()
    assert not box.overlaps(ax.get_window_extent())
    assert not box.overlaps(ax.xaxis.label.get_window_extent())
    assert box.x0 >= 0 and box.y0 >= 0


def test_many_models_leave_a_panel_its_size():
    heights = []
    for count in (2, 20):
        figure, axes = plotting.canvas(columns=2, rows=2, width=3, height=3)
        frame = pd.DataFrame({"step": [1, 2], "value": [0.5, 0.6]})
        for i in range(count):
            for ax in axes.flat:
                style, name = plotting.line_style(i), f"the model with the number {i}"
                plotting.line(ax, frame, "step", style=style, label=name, interval=None)
        plotting.legend(axes[0, 0], below=True)
        plotting.legend(axes[0, 1], below=True, only=["the model with the number 1"])
        assert len(axes[0, 1].get_legend().get_texts()) == 1
        plotting.legend_below(figure, axes.flat, without=["the model with the number 0"])
        assert len(figure.legends[0].get_texts()) == count - 1
        drawn(figure)
        heights.append(axes[0, 0].get_window_extent().height)
    assert heights[1] > 0.75 * heights[0]


def test_a_logarithmic_axis_has_plain_numbers():
    figure, axes = plotting.canvas()
    ax = axes[0, 0]
    ax.plot([0, 1], [0.001, 8.0])
    plotting.log_axis(ax)
    drawn(figure)
    written = {label.get_text() for label in ax.get_yticklabels()}
    assert {"0.001", "0.01", "0.1", "1"} <= written
    ax.set_ylim(0.5, 3)
    drawn(figure)
    assert {"0.5", "2"} <= {label.get_text() for label in ax.get_yticklabels(minor=True)}


# ---- the user's settings -------------------------------------------------------------------------

HOSTILE = {
    "origin": {"image.origin": "lower"},
    "dark": dict(matplotlib.style.library["dark_background"]),
    "usetex": {"text.usetex": True},
    "look": {"font.size": 22, "axes.grid": True, "lines.linewidth": 7, "savefig.bbox": "tight"},
}


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


TABLES = Path(__file__).parent.parent / "figures"


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


# ---- heat maps -----------------------------------------------------------------------------------


def test_heat_map_writes_its_numbers_in_their_cells():
    figure, axes = plotting.canvas()
    ax = axes[0, 0]
    values = np.array([[0.0, 0.256, 1.0], [-0.5, 0.8, 12.346]])
    plotting.heat_map(figure, ax, values, [1, 2, 3], ["a", "b"], "hit ratio")
    written = {text.get_position(): text.get_text() for text in ax.texts}
    # by (column, row); no leading zero, as in papers; 12.346 leaves one decimal to all
    first_row = {(0, 0): ".0", (1, 0): ".3", (2, 0): "1.0"}
    assert written == {**first_row, (0, 1): "-.5", (1, 1): ".8", (2, 1): "12.3"}
    drawn(figure)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert [other.get_ylabel() for other in figure.axes if other is not ax] == ["hit ratio"]


@pytest.mark.parametrize("low", [0, -1])
def test_ink_stands_out_from_its_cell(low):
    figure, axes = plotting.canvas()
    values = np.linspace(low, 1, 10)[None]
    plotting.heat_map(figure, axes[0, 0], values, list(range(10)), ["a"], "x")
    image, texts = axes[0, 0].images[0], axes[0, 0].texts
    for value, text in zip(values[0], texts, strict=True):
        shade = image.cmap(image.norm(value))[:3]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade]
        luminance = np.dot([0.2126, 0.7152, 0.0722], linear)
        contrast = (
            (luminance + 0.05) / 0.05 if text.get_color() == "black" else 1.05 / (luminance + 0.05)
        )
        assert contrast > 3, value  # WCAG's ratio; 21 is black on white


@pytest.mark.parametrize(
    ("columns", "numbers", "count"), [(14, True, 28), (15, True, 0), (3, False, 0)]
)
def test_numbers_only_where_they_fit(columns, numbers, count):
    figure, axes = plotting.canvas()
    plotting.heat_map(
        figure, axes[0, 0], np.zeros((2, columns)), list(range(columns)), [0, 1], "x", numbers
    )
    assert len(axes[0, 0].texts) == count
    drawn(figure)


def test_heat_map_with_holes():
    figure, axes = plotting.canvas()
    plotting.heat_map(figure, axes[0, 0], np.array([[0.5, np.nan]]), [1, 2], ["a"], "x")
    assert [text.get_text() for text in axes[0, 0].texts] == [".50"]
    plotting.heat_map(figure, axes[0, 0], np.full((1, 2), np.nan), [1, 2], ["a"], "x")
    drawn(figure)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.5, -0.256, 1.0, -0.001], [".50", "-.26", "1.00", ".00"]),
        ([0.0123, -0.05], [".012", "-.050"]),
        ([0.0, 0.0], [".00", ".00"]),
        ([99.94, 0.5, np.nan], ["99.9", ".5", ""]),
        ([1234.4, -0.4, 0.6], ["1234", "0", "1"]),
    ],
)
def test_one_number_format_in_a_matrix(values, texts):
    assert plotting.numbers_of(np.array([values])).tolist() == [texts]


@pytest.mark.parametrize(
    ("values", "limits", "palette", "ends"),
    [
        ([-0.2, 0.1], (None, None), "RdBu_r", (-0.2, 0.2)),
        ([-0.2, 0.7], (None, None), "RdBu_r", (-0.7, 0.7)),
        ([0.2, 0.7], (-1, 0.5), "RdBu_r", (-1, 1)),
        ([0.2, 0.7], (None, None), "viridis", (0.2, 0.7)),
        ([-0.2, 1.7], (0, 1), "viridis", (0, 1)),
    ],
)
def test_values_below_zero_diverge_around_it(values, limits, palette, ends):
    figure, axes = plotting.canvas()
    plotting.heat_map(figure, axes[0, 0], np.array([values]), [1, 2], ["a"], "x", limits=limits)
    (image,) = axes[0, 0].images
    assert (image.cmap.name, image.get_clim()) == (palette, ends)
    assert image.colorbar.extend == ("both" if limits == (0, 1) else "neither")
    if palette == "RdBu_r":
        assert min(image.cmap(image.norm(0.0))[:3]) > 0.95  # 0 is white


@pytest.mark.parametrize("count", [24, 300])
def test_labels_of_cells_do_not_overlap(count):
    figure, axes = plotting.canvas()
    names = [str(100 + i) for i in range(count)]
    values = np.zeros((count, count))
    plotting.heat_map(figure, axes[0, 0], values, names, ["class " + n for n in names], "x")
    drawn(figure)
    for labels in (axes[0, 0].get_xticklabels(), axes[0, 0].get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) > 3
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


# ---- overlay -------------------------------------------------------------------------------------


def test_overlay_of_a_constant_map():
    """No division by zero (warnings are errors here), and one shade everywhere."""
    figure, axes = plotting.canvas()
    plotting.overlay(axes[0, 0], np.zeros((16, 24, 3)), np.full((2, 3), 0.4))
    shade = axes[0, 0].images[1].get_array()
    assert shade.shape == (2, 3, 4)
    assert (shade == shade[0, 0]).all()
    assert np.isfinite(shade).all()
    drawn(figure)


def test_overlay_spreads_a_map_of_any_scale():
    _, axes = plotting.canvas()
    saliency = np.array([[1e-6, 3e-6], [2e-6, 5e-6]])
    plotting.overlay(axes[0, 0], np.zeros((8, 8, 3)), saliency)
    image, shade = axes[0, 0].images
    expected = plotting.colormaps["viridis"](np.array([[0, 0.5], [0.25, 1]]))
    np.testing.assert_allclose(shade.get_array(), expected, atol=0.01)
    assert list(image.get_extent()) == list(shade.get_extent()) == [0, 8, 8, 0]


def test_overlay_puts_patch_and_outline_where_they_are():
    """The brightest patch of a 2 x 2 grid lies top right, around it the mask's outline."""
    figure = Figure(figsize=(2, 2), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))
    mask = np.zeros((20, 20), dtype=bool)
    mask[:10, 10:] = True
    plotting.overlay(ax, np.zeros((20, 20, 3)), np.array([[0.0, 1.0], [0.0, 0.0]]), mask)
    pixels = drawn(figure).astype(int)
    low, high = (0.7 * 255 * np.array(plotting.colormaps["viridis"](end)[:3]) for end in (0.0, 1.0))
    np.testing.assert_allclose(pixels[50, 150], high, atol=3)
    for row, column in ((50, 50), (150, 50), (150, 150)):
        np.testing.assert_allclose(pixels[row, column], low, atol=3)
    white = (pixels > 200).all(-1)
    assert white[20:80, 95:105].any(1).all()  # its left side ...
    assert white[95:105, 120:180].any(0).all()  # ... and its lower one
    assert not white[110:].any() and not white[:, :90].any()


@pytest.mark.parametrize("value", [False, True])
def test_overlay_of_a_mask_without_edge(value):
    figure, axes = plotting.canvas()
    plotting.overlay(axes[0, 0], np.zeros((8, 8, 3)), outline=np.full((8, 8), value))
    assert len(axes[0, 0].collections) == 0
    assert len(axes[0, 0].images) == 1
    drawn(figure)


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dpi", "size"), [(150, (1260, 480)), (50, (420, 160))])
def test_save_writes_a_png_of_that_size(tmp_path, dpi, size):
    figure, axes = plotting.canvas(columns=2)
    axes[0, 0].plot([1, 2], **plotting.line_style(0))
    plotting.save(figure, tmp_path / "new" / "a.png", dpi=dpi)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert (image.format, image.size) == ("PNG", size)
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0] == 255).all()  # white paper
    assert (abs(pixels.astype(int) - (0, 0x72, 0xB2)).sum(-1) < 10).any()  # and the line on it
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    plotting.save(plotting.canvas()[0], path, dpi=20)
    old = path.read_bytes()

    def full(self, target, **kwargs):
        target.write_bytes(b"half a PNG")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plotting.save(plotting.canvas()[0], path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
