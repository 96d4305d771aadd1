"""Heat maps write their numbers in their cells; an overlay lies where its patches are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from drawing import drawn
from matplotlib import colormaps
from matplotlib.figure import Figure

from bvit_interp import plotting


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
    expected = colormaps["viridis"](np.array([[0, 0.5], [0.25, 1]]))
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
    low, high = (0.7 * 255 * np.array(colormaps["viridis"](end)[:3]) for end in (0.0, 1.0))
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
