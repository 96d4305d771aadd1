"""Thresholds, costs, nulls and times of early exit, against a loop over images."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.analyses import evaluate
from bvit_interp.analyses.early_exit import COLUMNS, CURVE, Config, _leave, measure, plot
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.models.cost import flops
from bvit_interp.models.exits import FILE, Exits, run_with_exits
from bvit_interp.models.unroll import unroll


@pytest.fixture
def exits_of(tmp_path):
    """``exits_of(model, steps)``: random exits written for a model; their folder."""

    def write(model, steps=(1, 2), name="exits", scale=0.3):
        generator = torch.Generator().manual_seed(0)
        exits = Exits(steps, model.embed_dim, model.num_classes)
        for parameter in exits.parameters():
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        (tmp_path / name).mkdir()
        exits.save(tmp_path / name / FILE, model, {})
        return tmp_path / name

    return write


def test_every_threshold_is_a_run_that_really_stops(any_model, digits, exits_of):
    folder = exits_of(any_model)
    config = Config(exits=(folder,), thresholds=(0.2, 0.6), timed_images=0)
    frame = measure({"m": any_model}, digits, config)
    geometry = Geometry.of(any_model, digits)
    images = torch.stack([geometry(digits.read(i)[0], None)[0] for i in range(60)])
    labels = np.array([digits.read(i)[1] for i in range(60)])
    exits, view = Exits.load(folder / FILE, any_model), unroll(any_model)
    head = 2 * any_model.embed_dim * any_model.num_classes
    for _, row in frame[frame["kind"] == "threshold"].iterrows():
        logits, left = run_with_exits(view, exits, images, row["threshold"])
        assert row["accuracy"] == (logits.argmax(-1).numpy() == labels).mean()
        assert row["mean_step"] == pytest.approx(left.double().mean().item())
        read = [
            min(2, sum(t <= gone for t in exits.steps) - (gone in exits.steps))
            for gone in left.tolist()
        ]
        for column, attention in (("gflops", False), ("gflops_attention", True)):
            costs = [
                flops(any_model, count_attention=attention, steps=t) + e * head
                for t, e in zip(left.tolist(), read, strict=True)
            ]
            assert row[column] == pytest.approx(np.mean(costs) / 1e9)


def test_no_image_leaves_above_every_confidence(tiny, digits, exits_of):
    frame = measure({"m": tiny}, digits, Config(exits=(exits_of(tiny, (6, 8)),), timed_images=0))
    curve = frame[frame["kind"] == "curve"].set_index("threshold")
    assert list(curve.index) == list(CURVE)
    whole = evaluate.measure({"m": tiny}, digits, evaluate.Config())
    assert curve.loc[1.0, "accuracy"] == whole["top1"].iloc[0]
    assert curve.loc[1.0, "mean_step"] == 12
    plain = flops(tiny, count_attention=True)
    assert curve.loc[1.0, "saved_flops"] == pytest.approx(
        -2 * 2 * 32 * 10 / plain
    )  # exits read in vain
    assert curve.loc[0.0, "mean_step"] == 6
    assert (np.diff(curve["mean_step"]) >= 0).all()


def test_exits_classes_and_nulls(tiny, digits, exits_of):
    config = Config(exits=(exits_of(tiny, (6, 8)),), timed_images=0, thresholds=(0.2, 0.3, 0.4))
    frame = measure({"m": tiny}, digits, config)
    exits = frame[frame["kind"] == "exit"].set_index("exit")
    assert list(exits.index) == [6, 8, 12]
    assert exits["share"].sum() == pytest.approx(1)
    assert (exits["accuracy"] == exits["accuracy_null"]).all()
    middle = frame[(frame["kind"] == "threshold") & (frame["threshold"] == 0.3)].iloc[0]
    assert middle["accuracy_null"] == pytest.approx((exits["share"] * exits["accuracy"]).sum())
    assert middle["mean_step"] == pytest.approx((exits["share"] * exits.index).sum())
    classes = frame[frame["kind"] == "class"]
    assert classes["n"].sum() == 60
    assert (classes["n"] * classes["accuracy"]).sum() / 60 == pytest.approx(middle["accuracy"])
    assert exits["auroc"].between(0, 1).all()
    assert exits["calibration_error"].between(0, 1).all()


def test_who_leaves_where_on_paper():
    confidence = np.array([[0.9, 0.2, 0.1], [0.5, 0.6, 0.1], [0.1, 0.2, 0.3]])
    assert _leave(confidence, 0.5).tolist() == [0, 1, 2]  # exceeds: 0.5 does not
    assert _leave(confidence, 0.0).tolist() == [0, 0, 0]
    assert _leave(confidence, 1.0).tolist() == [2, 2, 2]


def test_times_are_measured_for_thresholds_and_if_asked_for_the_curve(tiny, digits, exits_of):
    config = Config(
        exits=(exits_of(tiny, (1, 2)),), timed_images=60, timed_batch=4, thresholds=(0.0, 1.0)
    )
    frame = measure({"m": tiny}, digits, config)
    timed = frame[frame["kind"] == "threshold"].set_index("threshold")
    assert (timed["ms"] > 0).all()
    assert timed.loc[0.0, "saved_time"] > 0.3  # 1 of 12 steps
    assert frame[frame["kind"] != "threshold"]["ms"].isna().all()
    every = measure({"m": tiny}, digits, dataclasses.replace(config, timed_curve=True))
    assert (every[every["kind"].isin(["threshold", "curve"])]["ms"] > 0).all()
    assert every[every["kind"].isin(["exit", "class"])]["ms"].isna().all()
    shown = plot(every).axes[1].lines[0]
    assert len(shown.get_xdata()) == 51
    few = measure(
        {"m": tiny}, digits, Config(exits=config.exits, timed_images=8, limit=8)
    )  # less than a batch of 32
    assert (few[few["kind"] == "threshold"]["ms"] > 0).all()


def test_several_models_and_the_figure_from_the_csv(tiny, stacked, digits, exits_of):
    config = Config(
        exits=(exits_of(tiny, (6, 8), "a"), exits_of(stacked, (1,), "b")),
        timed_images=32,
        batch_size=16,
    )
    frame = measure({"a": tiny, "b": stacked}, digits, config)
    assert list(frame) == list(COLUMNS)
    figure = plot(pd.read_csv(io.StringIO(frame.to_csv(index=False))))
    curve = frame[(frame["model"] == "a") & (frame["kind"] == "curve")].sort_values("gflops")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), curve["accuracy"])


def test_bad_input(tiny, tiny_te, digits, exits_of):
    for thresholds in ((), (1.2,), (-0.1, 0.5)):
        with pytest.raises(UserError, match=r"thresholds must be in 0\.\.1"):
            Config(thresholds=thresholds)
    folder = exits_of(tiny)
    with pytest.raises(CheckpointError, match="another model's weights"):
        measure({"m": tiny_te}, digits, Config(exits=(folder,)))
    with pytest.raises(UserError, match="2 checkpoints need as many folders of exits, got 1"):
        measure({"a": tiny, "b": tiny_te}, digits, Config(exits=(folder,)))
