"""Panels have their size, axes have whole steps and plain numbers, files are whole."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from drawing import drawn
from matplotlib.figure import Figure
from PIL import Image

from bvit_interp import plotting


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


def test_a_long_title_stays_over_its_panel():
    figure, axes = plotting.canvas(columns=2)
    for ax in axes.flat:
        plotting.title(ax, "vit-of-many-words-" * 6 + ": accuracy")
    drawn(figure)
    left, right = (ax.title.get_window_extent() for ax in axes.flat)
    assert not left.overlaps(right)
    assert left.x0 >= 0 and right.x1 <= figure.bbox.width


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


def test_shares_end_where_shares_end():
    _, axes = plotting.canvas()
    axes[0, 0].plot([0, 1], [0.0, 0.2])
    plotting.share_axis(axes[0, 0])
    assert axes[0, 0].get_ylim() == (0, 1.02)


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
