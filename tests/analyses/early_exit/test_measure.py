"""Thresholds, costs, nulls and times of early exit, against loops over images."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import foreign

from bvit_interp.analyses import evaluate
from bvit_interp.analyses.early_exit import COLUMNS, Config, measure, summary
from bvit_interp.analyses.early_exit.measure import CURVE
from bvit_interp.data.geometry import Geometry
from bvit_interp.data.samples import Subset
from bvit_interp.errors import CheckpointError, UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.cost import flops
from bvit_interp.models.exits import FILE, Exits, exit_logits, run_with_exits
from bvit_interp.models.unroll import unroll


def test_every_threshold_is_a_run_that_really_stops(any_model, digits, exits_of):
    folder = exits_of(any_model)
    config = Config(exits=(folder,), thresholds=(0.2, 0.6), n_timed=0)
    frame = measure({"m": any_model}, digits, config)
    geometry = Geometry.of(any_model, digits)
    images = torch.stack([geometry(digits.read(i)[0], None)[0] for i in range(60)])
    labels = np.array([digits.read(i)[1] for i in range(60)])
    exits, view = Exits.load(folder / FILE, any_model), unroll(any_model)
    head = 2 * any_model.embed_dim * any_model.num_classes
    for _, row in frame[frame["table"] == "threshold"].iterrows():
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
    frame = measure({"m": tiny}, digits, Config(exits=(exits_of(tiny, (6, 8)),), n_timed=0))
    curve = frame[frame["table"] == "curve"].set_index("threshold")
    assert list(curve.index) == list(CURVE)
    whole = evaluate.measure({"m": tiny}, digits, evaluate.Config())
    assert curve.loc[1.0, "accuracy"] == whole["accuracy"].iloc[0]
    assert curve.loc[1.0, "mean_step"] == 12
    plain = flops(tiny, count_attention=True)
    assert curve.loc[1.0, "saved_flops"] == pytest.approx(
        -2 * 2 * 32 * 10 / plain
    )  # exits read in vain
    assert curve.loc[0.0, "mean_step"] == 6
    assert (np.diff(curve["mean_step"]) >= 0).all()


def test_exits_classes_and_nulls(tiny, digits, exits_of):
    config = Config(exits=(exits_of(tiny, (6, 8)),), n_timed=0, thresholds=(0.2, 0.3, 0.4))
    frame = measure({"m": tiny}, digits, config)
    exits = frame[frame["table"] == "exit"].set_index("exit")
    assert list(exits.index) == [6, 8, 12]
    assert exits["share"].sum() == pytest.approx(1)
    assert (exits["accuracy"] == exits["accuracy_null"]).all()
    middle = frame[(frame["table"] == "threshold") & (frame["threshold"] == 0.3)].iloc[0]
    assert middle["accuracy_null"] == pytest.approx((exits["share"] * exits["accuracy"]).sum())
    assert middle["mean_step"] == pytest.approx((exits["share"] * exits.index).sum())
    classes = frame[frame["table"] == "class"]
    assert classes["n"].sum() == 60
    assert (classes["n"] * classes["accuracy"]).sum() / 60 == pytest.approx(middle["accuracy"])
    assert exits["auroc"].between(0, 1).all()
    assert exits["calibration_error"].between(0, 1).all()


def test_times_are_measured_for_thresholds_and_if_asked_for_the_curve(tiny, digits, exits_of):
    config = Config(
        exits=(exits_of(tiny, (1, 2)),), n_timed=60, timed_batch=4, thresholds=(0.0, 1.0)
    )
    frame = measure({"m": tiny}, digits, config)
    timed = frame[frame["table"] == "threshold"].set_index("threshold")
    assert (timed["latency_ms"] > 0).all()
    assert timed.loc[0.0, "saved_time"] > 0.3  # 1 of 12 steps
    assert frame[frame["table"] != "threshold"]["latency_ms"].isna().all()
    every = measure({"m": tiny}, digits, dataclasses.replace(config, timed_curve=True))
    assert (every[every["table"].isin(["threshold", "curve"])]["latency_ms"] > 0).all()
    assert every[every["table"].isin(["exit", "class"])]["latency_ms"].isna().all()
    few = measure(
        {"m": tiny}, digits, Config(exits=config.exits, n_timed=8, limit=8)
    )  # less than a batch of 32
    assert (few[few["table"] == "threshold"]["latency_ms"] > 0).all()


def test_several_models(tiny, stacked, digits, exits_of):
    folders = (exits_of(tiny, (6, 8), "a"), exits_of(stacked, (1,), "b"))
    frame = measure({"a": tiny, "b": stacked}, digits, Config(exits=folders, n_timed=0))
    assert list(frame) == list(COLUMNS)
    for name, model, folder in (("a", tiny, folders[0]), ("b", stacked, folders[1])):
        alone = measure({name: model}, digits, Config(exits=(folder,), n_timed=0))
        own = frame[frame["model"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, alone, check_dtype=False)
    assert set(summary(frame)["table"]) == {"threshold", "exit", "class"}


def test_auroc_and_calibration_error_against_loops(tiny, digits, exits_of):
    """Over pairs of a correct and a wrong prediction, and over 15 bins of the confidence."""
    folder = exits_of(tiny, (6,))
    frame = measure({"m": tiny}, digits, Config(exits=(folder,), n_timed=0))
    images = torch.stack([Geometry.of(tiny, digits)(digits.read(i)[0])[0] for i in range(60)])
    labels = torch.tensor([digits.read(i)[1] for i in range(60)])
    with torch.inference_mode():
        logits = exit_logits(unroll(tiny), Exits.load(folder / FILE, tiny), images)
    p = logits.double().softmax(-1).numpy()
    for e, step in enumerate((6, 12)):
        row = frame[frame["exit"] == step].iloc[0]
        confidence, correct = p[:, e].max(-1), p[:, e].argmax(-1) == labels.numpy()
        pairs = [
            (good > bad) + (good == bad) / 2
            for good in confidence[correct]
            for bad in confidence[~correct]
        ]
        assert row["auroc"] == pytest.approx(np.mean(pairs))
        bins, error = np.ceil(confidence * 15), 0.0
        for m in np.unique(bins):
            inside = bins == m
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        assert row["calibration_error"] == pytest.approx(error, rel=1e-4)
        assert row["accuracy"] == correct.mean()
        assert (row["low"], row["high"]) == wilson_interval(int(correct.sum()), 60)


def test_rows_of_classes_have_the_names_of_the_data(tiny, digits, exits_of):
    """Ten classes each, which the model has in another order."""
    tiny.pretrained_cfg["label_names"] = list(digits.classes[::-1])
    some = Subset(digits, [i for i in range(60) if digits.read(i)[1] < 3 or i % 3 == 0])
    frame = measure({"m": tiny}, some, Config(exits=(exits_of(tiny),), n_timed=0))
    rows = frame[frame["table"] == "class"]
    labels = [some.read(i)[1] for i in range(len(some))]
    assert rows.set_index("class")["n"].to_dict() == {
        digits.classes[label]: count for label, count in Counter(labels).items()
    }


@pytest.mark.parametrize("kind", ["encoder", "prelude", "looped_timm", "dinov3"])
def test_models_that_are_not_ours_are_refused(kind, tiny, digits, exits_of):
    with pytest.raises(UserError, match="theirs is no BViT and no stacked timm VisionTransformer"):
        measure({"theirs": foreign(kind)}, digits, Config(exits=(exits_of(tiny),)))


def test_bad_input(tiny, tiny_te, digits, exits_of):
    for options in ({"n_timed": -1}, {"timed_batch": 0}):
        with pytest.raises(UserError, match="n-timed must be >= 0 and timed-batch >= 1"):
            Config(**options)
    for thresholds in ((), (1.2,), (-0.1, 0.5)):
        with pytest.raises(UserError, match=r"thresholds must be in 0\.\.1"):
            Config(thresholds=thresholds)
    folder = exits_of(tiny)
    with pytest.raises(CheckpointError, match="another model's weights"):
        measure({"m": tiny_te}, digits, Config(exits=(folder,)))
    with pytest.raises(UserError, match="2 checkpoints need as many folders of exits, got 1"):
        measure({"a": tiny, "b": tiny_te}, digits, Config(exits=(folder,)))
