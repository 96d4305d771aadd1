"""Legends name each line once, say what bands are, and hide nothing."""

from __future__ import annotations

import pandas as pd
from drawing import drawn, two_lines
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from bvit_interp import plotting


def entries(legend):
    return [text.get_text() for text in legend.get_texts()]


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
