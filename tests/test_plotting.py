"""The house style keeps its word: whole steps, lines that differ in grey, numbers in cells, whole
files."""

from __future__ import annotations

import errno
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from bvit_interp import plotting


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
    assert not legend.get_frame_on()
    drawn(figure)


# ---- heat maps -----------------------------------------------------------------------------------


def test_heat_map_writes_its_numbers_in_their_cells():
    figure, axes = plotting.canvas()
    ax = axes[0, 0]
    values = np.array([[0.0, 0.256, 1.0], [-0.5, 0.8, 12.346]])
    plotting.heat_map(figure, ax, values, [1, 2, 3], ["a", "b"], "hit ratio")
    written = {text.get_position(): text.get_text() for text in ax.texts}
    # by (column, row); no leading zero, as in papers
    first_row = {
        (0, 0): ".00",
        (1, 0): ".26",
        (2, 0): "1.00",
    }
    assert written == {**first_row, (0, 1): "-0.50", (1, 1): ".80", (2, 1): "12.35"}
    drawn(figure)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert [other.get_ylabel() for other in figure.axes if other is not ax] == ["hit ratio"]


def test_ink_stands_out_from_its_cell():
    figure, axes = plotting.canvas()
    values = np.linspace(0, 1, 10)[None]
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
    assert axes[0, 0].texts[0].get_text() == ".50"
    drawn(figure)


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
