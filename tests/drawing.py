"""What the tests of figures share: pixels of a figure, and a panel with two lines."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bvit_interp import plotting


def drawn(figure: Figure) -> np.ndarray:
    """The figure after layout and drawing, as pixels ``(height, width, 3)`` 0..255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def two_lines(ax: Axes, nulls: list[float], **options: object) -> None:
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
