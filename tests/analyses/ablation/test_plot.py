"""The figure of ablation, from the CSV alone."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from bvit_interp.analyses.ablation import Config, measure, plot


def drawn_lines(figure):
    """Label -> y values of every labelled line."""
    return [
        (line.get_label(), np.asarray(line.get_ydata())) for ax in figure.axes for line in ax.lines
    ]


def is_drawn(lines, label, values):
    return any(
        name == label and len(ys) == len(values) and np.allclose(ys, values) for name, ys in lines
    )


def test_the_figure_has_the_numbers_of_the_csv(make, digits):
    models = {"a": make(num_steps=3, num_heads=2), "b": make(seed=1, num_steps=3, num_heads=2)}
    frame = measure(models, digits, Config(groups=2, n_ablated=6))
    frame = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    figure = plot(frame)
    shown = frame[frame["method"] == "mean"]
    heads = shown[shown["site"] == "z"]
    lines = drawn_lines(figure)
    for _, kl in heads[(heads["scope"] == "each") & (heads["metric"] == "kl")].groupby("model"):
        assert is_drawn(lines, "head 1", kl[kl["unit"] == 1]["value"])
        assert is_drawn(lines, "null: random channels", kl[kl["unit"] == 1]["null"])
        norms = kl.pivot(index="step", columns="unit", values="norm_null")
        assert is_drawn(lines, "null: random direction", (norms[0] * norms[1]) ** 0.5)
    from_step = heads[(heads["scope"] == "from") & (heads["metric"] == "log_prob")]
    first = from_step[(from_step["model"] == "a") & (from_step["unit"] == 0)]
    assert is_drawn(lines, "a: each head", first["value"])
    maps = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    for _, part in shown[(shown["scope"] == "each") & (shown["metric"] == "log_prob")].groupby(
        "model"
    ):
        table = part.pivot_table(index=["site", "unit"], columns="step", values="value")
        table = table.loc[["z", "mlp_post"]].to_numpy()
        assert any(each.shape == (4, 3) and np.allclose(each, table) for each in maps)
    limits = {ax.images[0].get_clim() for ax in figure.axes if ax.images and ax.get_ylabel() == ""}
    assert len(limits) == 1  # one scale


@pytest.mark.parametrize("scopes", [("all",), ("from",), ("each",), ("each", "all")])
def test_scopes_alone(make, digits, scopes):
    config = Config(n_ablated=3, groups=0, methods=("zero",), scopes=scopes)
    frame = measure({"m": make(num_steps=3, num_heads=2)}, digits, config)
    panels = [ax for ax in plot(frame).axes if ax.get_visible() and ax.get_xlabel()]
    assert len(panels) == {"all": 1, "from": 1, "each": 2}[scopes[0]] + (len(scopes) - 1)


def test_a_table_without_the_norm_matched_null_is_drawn(make, digits):
    """As the tables of earlier versions are."""
    config = Config(n_ablated=3, groups=0, methods=("zero",), scopes=("each",))
    frame = measure({"m": make(num_steps=3, num_heads=2)}, digits, config)
    older = plot(frame.drop(columns=["norm_null", "p_holm"]))
    empty = plot(frame.assign(norm_null=np.nan))
    for figure in (older, empty):
        labels = [label for label, _ in drawn_lines(figure)]
        assert "head 1" in labels
        assert not any("random direction" in label for label in labels)
