"""Evaluation against numpy, and raw and averaged weights on the command line."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from bvit_interp.analyses.evaluate import COLUMNS, Config, measure, summary
from bvit_interp.cli import main
from bvit_interp.data.geometry import Geometry
from bvit_interp.errors import DataError, UserError
from bvit_interp.metrics import wilson_interval
from bvit_interp.models.checkpoint import save


def logits_and_labels(model, data):
    geometry = Geometry.of(model, data)
    scenes = [data.read(i) for i in range(len(data))]
    with torch.no_grad():
        logits = (
            model(torch.stack([geometry(image, None)[0] for image, _, _ in scenes]))
            .double()
            .numpy()
        )
    return logits, np.array([label for _, label, _ in scenes])


def overall(frame):
    return frame[frame["bin"] == "all"].set_index("model")


def test_scores_against_numpy(any_model, digits):
    row = overall(measure({"m": any_model}, digits, Config(batch_size=11))).loc["m"]
    logits, labels = logits_and_labels(any_model, digits)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    hits, confidence = order[:, 0] == labels, probabilities.max(1)
    assert row["n"] == 60
    assert row["accuracy"] == hits.mean()
    assert row["top5_accuracy"] == (order[:, :5] == labels[:, None]).any(1).mean()
    assert row["loss"] == pytest.approx(
        -np.log(probabilities[np.arange(60), labels]).mean(), rel=1e-4
    )
    assert row["confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
    assert row["chance"] == np.bincount(labels).max() / 60
    assert row["top5_chance"] == np.sort(np.bincount(labels))[-5:].sum() / 60
    assert (row["low"], row["high"]) == wilson_interval(int(hits.sum()), 60)


def test_bins_hold_every_image_once_and_give_the_calibration_error(tiny, digits):
    frame = measure({"m": tiny}, digits, Config(bins=7))
    bins = frame[frame["bin"] != "all"]
    row = overall(frame).loc["m"]
    assert bins["n"].sum() == row["n"] == 60
    for _, part in bins.iterrows():
        hits = round(part["accuracy"] * part["n"])
        assert (part["low"], part["high"]) == pytest.approx(wilson_interval(hits, part["n"]))
    assert (bins["n"] > 0).all()
    share = bins["n"] / 60
    assert row["accuracy"] == pytest.approx((share * bins["accuracy"]).sum())
    assert row["confidence"] == pytest.approx((share * bins["confidence"]).sum())
    assert row["calibration_error"] == pytest.approx(
        (share * (bins["accuracy"] - bins["confidence"]).abs()).sum()
    )
    places = bins["bin"].astype(int)
    assert places.is_monotonic_increasing
    assert ((places - 1) / 7 < bins["confidence"]).all()
    assert (bins["confidence"] <= places / 7).all()


def test_a_model_that_knows_and_one_that_is_surely_wrong(make, digits):
    """Every image is a three and the head answers by its bias alone: accuracy, loss and error known
    on paper."""

    class Threes(type(digits)):
        def read(self, i):
            image, _, mask = super().read(i)
            return image, 3, mask

    models = {"right": make(), "wrong": make()}
    for place, model in zip((3, 4), models.values(), strict=True):
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.zero_()
            model.head.bias[place] = 20
    found = overall(measure(models, Threes("test", length=8), Config()))
    assert found["accuracy"].to_dict() == {"right": 1.0, "wrong": 0.0}
    assert found.loc["right", "calibration_error"] == pytest.approx(0, abs=1e-7)
    assert found.loc["wrong", "calibration_error"] == pytest.approx(1, abs=1e-7)
    assert found.loc["wrong", "loss"] == pytest.approx(20, abs=1e-6)
    assert found["chance"].tolist() == [1.0, 1.0]


def test_classes_are_those_of_the_model(make, digits):
    """A model that names its classes in another order is scored by name."""
    model, names = make(), list(digits.classes)
    before = overall(measure({"m": model}, digits, Config())).loc["m"]
    turned = names[1:] + names[:1]
    with torch.no_grad():
        for parameter in (model.head.weight, model.head.bias):
            parameter.copy_(parameter.roll(-1, 0))
    model.pretrained_cfg.update(label_names=turned)
    after = overall(measure({"m": model}, digits, Config())).loc["m"]
    assert after["accuracy"] == before["accuracy"]
    assert after["loss"] == pytest.approx(before["loss"])


def test_fewer_than_five_classes_have_no_top5(make, squares):
    frame = measure({"m": make(num_classes=3)}, squares(), Config())
    assert frame["top5_accuracy"].isna().all()
    assert overall(frame)["chance"].item() == pytest.approx(1 / 3)


def test_several_models_share_one_pass_and_change_nothing(tiny, tiny_reg4, digits):
    reads = []

    class Counted(type(digits)):
        def read(self, i):
            reads.append(i)
            return super().read(i)

    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    both = measure({"a": tiny, "b": tiny_reg4}, Counted("test", length=20), Config())
    assert sorted(reads) == list(range(20))
    alone = measure({"b": tiny_reg4}, Counted("test", length=20), Config())
    pd.testing.assert_frame_equal(both[both["model"] == "b"].reset_index(drop=True), alone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_columns_and_order_of_rows(tiny, tiny_te, digits):
    frame = measure({"a": tiny, "b": tiny_te}, digits, Config(limit=30))
    assert list(frame) == list(COLUMNS)
    assert frame["model"].tolist()[:2] == ["a", "b"]
    assert frame["bin"].tolist()[:2] == ["all", "all"]
    assert (frame["bin"].iloc[2:] != "all").all()
    pd.testing.assert_frame_equal(summary(frame), frame.iloc[:2])


def test_the_command_scores_raw_and_averaged_weights(tiny, make, tmp_path, digits):
    other = make(seed=5)
    averaged = str(save(tiny, tmp_path / "averaged", ema=other.state_dict()))
    raw = str(save(other, tmp_path / "raw"))
    assert main(["evaluate", "--ckpt", averaged, raw, "--limit", "40", "--out", str(tmp_path)]) == 0
    found = overall(pd.read_csv(tmp_path / "evaluate.csv"))
    assert list(found.index) == ["averaged", "averaged@ema", "raw"]
    assert found.loc["averaged@ema"].equals(found.loc["raw"])
    assert found.loc["averaged", "loss"] != found.loc["raw", "loss"]
    assert (
        main(
            [
                "evaluate",
                "--ckpt",
                f"{averaged}@ema",
                averaged,
                "--limit",
                "4",
                "--out",
                str(tmp_path),
                "--overwrite",
            ]
        )
        == 0
    )
    assert list(overall(pd.read_csv(tmp_path / "evaluate.csv")).index) == [
        "averaged@ema",
        "averaged",
    ]
    assert main(["energy-rank", "--ckpt", averaged, "--limit", "4", "--out", str(tmp_path)]) == 0
    assert set(pd.read_csv(tmp_path / "energy_rank.csv")["model"]) == {
        "averaged"
    }  # the others take what is given
    assert (
        main(["evaluate", "--ckpt", averaged, averaged, "--limit", "4", "--out", str(tmp_path)])
        == 2
    )


def test_bad_input(tiny, digits):
    with pytest.raises(UserError, match="bins must be >= 1, got 0"):
        Config(bins=0)
    tiny.reset_classifier(7)
    with pytest.raises(DataError, match="do not match the model's 7"):
        measure({"m": tiny}, digits, Config())


def test_activations_that_overflow_are_said(tiny, digits):
    with torch.no_grad():
        tiny.head.bias[0] = math.inf
    with pytest.raises(UserError, match="logits hold NaN or infinite values"):
        measure({"m": tiny}, digits, Config(limit=2))
